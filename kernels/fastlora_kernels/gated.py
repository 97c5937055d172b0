"""The gated MLP in launches: gate and up as a group, the activation with down's shrink in it, down; and back.

Backward makes du in dz's place and z as a scratch that da of down alone reads; dx of gate and up is written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora_kernels.dy_pass import dy_pass
from fastlora_kernels.glu import glu, glu_backward
from fastlora_kernels.group import group_backward, group_linear
from fastlora_kernels.linear import base_linear, chosen, dx_by, expand_by
from fastlora_kernels.x_pass import x_pass

Optional = Sequence[Tensor | None]
"""One for gate, up and down each."""


def gated_linear(
    x: Tensor,
    ws: Sequence[Tensor],
    biases: Optional,
    as_: Optional,
    bs: Optional,
    lora_biases: Optional,
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    activation: str,
    how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = down(act(gate(x)) ⊙ up(x)), each layer as in `lora_linear`, or frozen where its a and b are None.

    x: [M, K].   ws: [I, K], [I, K], [N, I].   seeds: [3] int64, or None where nobody drops.   how: as in `lora_linear`.
    Returns y: [M, N], g = gate(x) and u = up(x): [M, I], h: [M, R_gate + R_up] fp32, h_down: [M, R_down] fp32.
    """
    (g, u), h = group_linear(
        x, ws[:2], biases[:2], as_[:2], bs[:2], lora_biases[:2],
        None if seeds is None else seeds[:2], scales[:2], ps[:2], how,
    )  # fmt: skip
    w, bias, a, b = ws[2], biases[2], as_[2], bs[2]
    z, h_down = glu(g, u, activation, a, p=ps[2], seed=None if seeds is None else seeds[2])
    if h_down is None or b is None:
        return base_linear(z, w, bias), g, u, h, z.new_empty((len(z), 0), dtype=torch.float32)
    return expand_by(z, w, bias, h_down, b, lora_biases[2], scales[2], how), g, u, h, h_down


def gated_backward(
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    ws: Optional,
    as_: Optional,
    bs: Optional,
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
    how: str,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None, Tensor | None, Tensor | None]:
    """dx, das, dbs, and dg, du with want_inner, z with want_z; each None unless wanted.

    dy: [M, N].   g, u: [M, I] as forward left them, read for all but down's db.   The rest as in `group_backward`.
    """
    before = want_dx or want_inner or any(want_das[:2]) or any(want_dbs[:2])
    w, a, b = ws[2], as_[2], bs[2]
    p, seed = ps[2], None if seeds is None else seeds[2]
    dh = db = da = dz = dg = du = z = dx = None
    if b is not None:
        dh, db = dy_pass(dy, h_down, b, scales[2], want_dh=before or want_das[2], want_db=want_dbs[2])
    if before and w is not None:
        if a is not None and dh is not None:
            fused = chosen("dx", dy, w.shape[1], w.shape[0], a.shape[0], how, int(p > 0)) == "fused"
            dz = dx_by(dy, w, dh, a, p, seed, fused)
        else:
            dz = torch.mm(dy, w)
    if g is not None and u is not None:
        if dz is not None:
            dg, du, z = glu_backward(g, u, dz, activation, du=dz, want_z=want_das[2] or want_z)
        elif want_das[2] or want_z:
            z, _ = glu(g, u, activation)
    if want_das[2] and z is not None and dh is not None and a is not None:
        da = x_pass(z, dh, a.dtype, p=p, seed=seed)
    if not want_z:
        z = None  # its memory serves what follows
    das: list[Tensor | None] = [None, None]
    dbs: list[Tensor | None] = [None, None]
    if dg is not None:
        dx, das, dbs = group_backward(
            [dg, du], x, ws[:2], as_[:2], bs[:2], h, None if seeds is None else seeds[:2], scales[:2], ps[:2],
            want_dx, want_das[:2], want_dbs[:2], how,
        )  # fmt: skip
    return dx, [*das, da], [*dbs, db], *((dg, du) if want_inner else (None, None)), z
