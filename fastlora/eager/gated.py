"""The gated MLP in plain PyTorch operators: the activation is computed again in backward, each step in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from fastlora.eager.base import batched, project, pull_back
from fastlora.eager.group import lora_group, lora_group_backward
from fastlora.eager.linear import lora_backward, lora_linear
from fastlora.eager.thin import wide_dtype


def activate(g: Tensor, activation: str) -> Tensor:
    """act(g), a new tensor."""
    match activation:
        case "silu":
            return silu(g)
        case "relu":
            return relu(g)
        case "relu2":
            return relu(g).square()  # not in place: autograd may be watching
        case _:
            return gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward_(dz: Tensor, g: Tensor, activation: str) -> Tensor:
    """dz ⊙ act'(g) in dz's place."""
    aten = torch.ops.aten
    match activation:
        case "silu":
            aten.silu_backward.grad_input(dz, g, grad_input=dz)
        case "relu":
            aten.threshold_backward.grad_input(dz, g, 0, grad_input=dz)
        case "relu2":
            dz.mul_(relu(g)).mul_(2)
        case _:
            how = "tanh" if activation == "gelu_tanh" else "none"
            aten.gelu_backward.grad_input(dz, g, approximate=how, grad_input=dz)
    return dz


def lora_gated(
    x: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = down(act(gate(x)) ⊙ up(x)); the lists are those of gate, up and down.

    Returns y: [M, N], g = gate(x) and u = up(x): [M, I], h: [M, R_gate + R_up] fp32, h_down: [M, R_down] fp32.
    """
    (g, u), h = lora_group(
        x, ws[:2], biases[:2], as_[:2], bs[:2], lora_biases[:2],
        None if seeds is None else seeds[:2], scales[:2], ps[:2],
    )  # fmt: skip
    z = activate(g, activation).mul_(u)
    w, bias, a, b = ws[2], biases[2], as_[2], bs[2]
    if a is None or b is None:
        return project(z, w, bias), g, u, h, z.new_empty((len(z), 0), dtype=wide_dtype(z))
    seed = seeds[2] if seeds is not None and ps[2] > 0 else None
    y, h_down = lora_linear(z, w, bias, a, b, lora_biases[2], seed, scales[2], ps[2])
    return y, g, u, h, h_down


def lora_gated_backward(
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    ws: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    h: Tensor | None,
    h_down: Tensor | None,
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    activation: str,
    want_dx: bool,
    want_das: Sequence[bool],
    want_dbs: Sequence[bool],
    want_inner: bool,
    want_z: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None, Tensor | None]:
    """dx, and da and db of each layer; with want_inner dg and du, with want_z z, as the base's own gradients need them.

    g, u are read for all but down's db alone; the rest as in `lora_group_backward`.   Returns dx, das, dbs, dg, du, z.
    """
    before = want_dx or want_inner or any(want_das[:2]) or any(want_dbs[:2])
    w, a, b = ws[2], as_[2], bs[2]
    da = db = dx = dz = dg = du = gate = z = None
    if g is not None and u is not None and (before or want_das[2] or want_z):
        gate = activate(g, activation)
        z = gate * u if want_das[2] or want_z else None
    if a is not None and b is not None:
        seed = seeds[2] if seeds is not None and ps[2] > 0 else None
        dz, da, db = lora_backward(dy, z, w, a, b, h_down, seed, scales[2], ps[2], before, want_das[2], want_dbs[2])
    elif before and w is not None:
        dz = pull_back((dy, w))
    if not want_z:
        z = None  # its memory serves what follows
    das: list[Tensor | None] = [None, None]
    dbs: list[Tensor | None] = [None, None]
    if before and dz is not None and gate is not None and g is not None and u is not None:
        if batched(dz):
            du, dg = gate * dz, dz.mul_(u).mul_(activate_backward_(torch.ones_like(g), g, activation))
        else:
            du = gate.mul_(dz)
            dg = activate_backward_(dz.mul_(u), g, activation)
        dx, das, dbs = lora_group_backward(
            [dg, du], x, ws[:2], as_[:2], bs[:2], h, None if seeds is None else seeds[:2], scales[:2], ps[:2],
            want_dx, want_das[:2], want_dbs[:2],
        )  # fmt: skip
    return dx, [*das, da], [*dbs, db], *((dg, du) if want_inner else (None, None)), z
