"""The gated MLP as opaque ops: all three layers and the activation between them, forward and backward.

Lists have an entry for gate, up and down; what a layer lacks is an empty tensor of one dimension, as in `ops.group`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import eager
from fastlora.ops.group import absent, present
from fastlora.ops.library import backend_of_many, fake_h, kernels, lib, plain, rows_of, shaped

lib.define(
    "lora_gated(Tensor x, Tensor[] ws, Tensor[] biases, Tensor[] as_, Tensor[] bs, Tensor[] lora_biases, "
    "Tensor? seeds, float[] scales, float[] ps, str activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "lora_gated_backward(Tensor dy, Tensor? x, Tensor? g, Tensor? u, Tensor[] ws, Tensor[] as_, Tensor[] bs, "
    "Tensor? h, Tensor? h_down, Tensor? seeds, float[] scales, float[] ps, str activation, bool want_dx, "
    "bool[] want_das, bool[] want_dbs, bool want_inner, bool want_z, str backend) -> Tensor[]"
)


@torch.library.impl(lib, "lora_gated", "CompositeExplicitAutograd")
def lora_gated(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = down(act(gate(x)) ⊙ up(x)), each layer w·x + bias + scale·(drop(x)·aᵀ·bᵀ + lora_bias).

    x: [..., K], ws: [I, K], [I, K], [N, I] of one dtype.   as_: [R, ·], bs: [·, R], any float dtype.   seeds: [3] int64
    on x's device; a layer drops where its p > 0.   activation: one of reference.ACTIVATIONS.
    Returns y: [..., N], g, u: [M, I] in x's dtype, h: [M, R_gate + R_up] and h_down: [M, R_down] fp32.
    """
    inputs = rows_of(x), ws, present(biases), present(as_), present(bs), present(lora_biases), seeds, scales, ps
    with plain(x):
        if backend == "torch":
            y, *kept = eager.lora_gated(*inputs, activation)
        else:
            y, *kept = kernels.gated_linear(*inputs, activation, backend)
    return shaped(y, *x.shape[:-1]), *kept  # type: ignore[return-value]


@torch.library.register_fake("fastlora::lora_gated", lib=lib)
def _(
    x: Tensor, ws: list[Tensor], biases: list[Tensor], as_: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate, up, down = (a.shape[0] for a in as_)
    h, h_down = fake_h(x, gate + up), fake_h(x, down)
    g, u = (x.new_empty((h.shape[0], w.shape[0])) for w in ws[:2])
    return x.new_empty((*x.shape[:-1], ws[2].shape[0])), g, u, h, h_down


def gated_gradients(
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    ws: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    h: Tensor | None,
    h_down: Tensor | None,
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    activation: str,
    want_dx: bool,
    want_das: list[bool],
    want_dbs: list[bool],
    want_inner: bool,
    want_z: bool,
    backend: str,
) -> tuple[Any, ...]:
    """(dx, das, dbs, dg, du, z), each None unless wanted; dg, du and z: [M, I] are what the base's own gradients need.

    dy: [..., N].   x, g, u, h, h_down: as forward had and returned them, needed for: das of gate and up; all but down's
    db; dbs; down's db.   ws: empty unless dx or an inner gradient is wanted.   The rest as in `lora_gated`.
    Returns dx: [..., K] in dy's dtype, das and dbs in the as' and bs' dtypes.
    """
    inputs = (
        rows_of(dy), None if x is None else rows_of(x), g, u, present(ws), present(as_), present(bs), h, h_down,
        seeds, scales, ps, activation, want_dx, want_das, want_dbs, want_inner, want_z,
    )  # fmt: skip
    backend = backend_of_many(backend, [dy], any(ps))
    with plain(dy):
        if backend == "torch":
            dx, *others = eager.lora_gated_backward(*inputs)
        else:
            dx, *others = kernels.gated_backward(*inputs, backend)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    return dx, *others


@torch.library.impl(lib, "lora_gated_backward", "CompositeExplicitAutograd")
def lora_gated_backward(*inputs: Any) -> list[Tensor]:
    """The wanted ones of `gated_gradients`, in order: an op's list has no place for None."""
    dx, das, dbs, *inner = gated_gradients(*inputs)
    return [grad for grad in (dx, *das, *dbs, *inner) if grad is not None]


@torch.library.register_fake("fastlora::lora_gated_backward", lib=lib)
def _(
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    ws: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    h: Tensor | None,
    h_down: Tensor | None,
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    activation: str,
    want_dx: bool,
    want_das: list[bool],
    want_dbs: list[bool],
    want_inner: bool,
    want_z: bool,
    backend: str,
) -> list[Tensor]:
    grads = []
    if want_dx:
        K = next(t.shape[1] for t in (*ws[:2], *as_[:2]) if not absent(t))
        grads.append(dy.new_empty((*dy.shape[:-1], K)))
    wanted = [*zip(want_das, as_, strict=True), *zip(want_dbs, bs, strict=True)]
    grads += [like.new_empty(like.shape) for want, like in wanted if want]
    if g is not None and u is not None:
        grads += [g.new_empty(g.shape), u.new_empty(u.shape)] if want_inner else []
        grads += [g.new_empty(g.shape)] if want_z else []
    return grads
