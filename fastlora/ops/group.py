"""Layers that share an input as opaque ops: forward and backward of all of them.

An op's list differentiates only where every entry is a tensor, so that what a member lacks (adapter, bias, gradient) is
an empty tensor of one dimension here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import eager
from fastlora.ops.library import backend_of_many, fake_h, kernels, lib, plain, rows_of, shaped

GROUP = 3
"""Members that one launch takes."""

lib.define(
    "lora_group(Tensor x, Tensor[] ws, Tensor[] biases, Tensor[] as_, Tensor[] bs, Tensor[] lora_biases, "
    "Tensor? seeds, float[] scales, float[] ps, str backend) -> (Tensor[], Tensor)"
)
lib.define(
    "lora_group_backward(Tensor[] dys, Tensor? x, Tensor[] ws, Tensor[] as_, Tensor[] bs, Tensor? h, "
    "Tensor? seeds, float[] scales, float[] ps, bool want_dx, bool[] want_das, bool[] want_dbs, str backend) "
    "-> Tensor[]"
)


def absent(t: Tensor) -> bool:
    return t.dim() == 1 and t.shape[0] == 0


def present(tensors: list[Tensor]) -> list[Tensor | None]:
    return [None if absent(t) else t for t in tensors]


@torch.library.impl(lib, "lora_group", "CompositeExplicitAutograd")
def lora_group(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """y_i = x·w_iᵀ + bias_i + scale_i·(drop_i(x)·a_iᵀ·b_iᵀ + lora_bias_i), one read of x for every shrink.

    x: [..., K], ws: [N_i, K] of one dtype.   as_: [R_i, K], bs: [N_i, R_i], any float dtype; empty where there is no
    adapter.   seeds: [members] int64 on x's device; member i drops where p_i > 0.
    Returns ys: [..., N_i] in x's dtype, h: [M, ΣR] fp32, the members' columns side by side.
    """
    lists = ws, present(biases), present(as_), present(bs), present(lora_biases)
    with plain(x):
        if backend == "torch":
            ys, h = eager.lora_group(rows_of(x), *lists, seeds, scales, ps)
        else:
            ys, h = kernels.group_linear(rows_of(x), *lists, seeds, scales, ps, backend)
    return [shaped(y, *x.shape[:-1]) for y in ys], h


@torch.library.register_fake("fastlora::lora_group", lib=lib)
def _(x: Tensor, ws: list[Tensor], biases: list[Tensor], as_: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in ws], fake_h(x, sum(a.shape[0] for a in as_))


def group_gradients(
    dys: list[Tensor],
    x: Tensor | None,
    ws: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    h: Tensor | None,
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    want_dx: bool,
    want_das: list[bool],
    want_dbs: list[bool],
    backend: str,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx, das, dbs, each None unless wanted; dx sums over the members and is written once.

    dys: [..., N_i], empty where an output was not used.   ws: empty unless dx is wanted.   x: [..., K], needed for das.
    h: as forward returned it, needed for dbs.   The rest as in `lora_group`.
    Returns dx: [..., K] in dy's dtype, das in the as', dbs in the bs'.
    """
    first = next(dy for dy in dys if not absent(dy))
    grads = [None if absent(dy) else rows_of(dy) for dy in dys]
    inputs = grads, None if x is None else rows_of(x), present(ws), present(as_), present(bs), h, seeds, scales, ps
    backend = backend_of_many(backend, grads, any(ps))
    with plain(first):
        if backend == "torch":
            dx, das, dbs = eager.lora_group_backward(*inputs, want_dx, want_das, want_dbs)
        else:
            dx, das, dbs = kernels.group_backward(*inputs, want_dx, want_das, want_dbs, backend)
    if dx is not None and first.dim() != 2:
        dx = dx.view(*first.shape[:-1], dx.shape[-1])
    return dx, das, dbs


@torch.library.impl(lib, "lora_group_backward", "CompositeExplicitAutograd")
def lora_group_backward(*inputs: Any) -> list[Tensor]:
    """The wanted ones of `group_gradients`, in order: an op's list has no place for None."""
    dx, das, dbs = group_gradients(*inputs)
    return [grad for grad in (dx, *das, *dbs) if grad is not None]


@torch.library.register_fake("fastlora::lora_group_backward", lib=lib)
def _(
    dys: list[Tensor],
    x: Tensor | None,
    ws: list[Tensor],
    as_: list[Tensor],
    bs: list[Tensor],
    h: Tensor | None,
    seeds: Tensor | None,
    scales: list[float],
    ps: list[float],
    want_dx: bool,
    want_das: list[bool],
    want_dbs: list[bool],
    backend: str,
) -> list[Tensor]:
    grads = []
    if want_dx:
        first = next(dy for dy in dys if not absent(dy))
        grads.append(first.new_empty((*first.shape[:-1], next(a.shape[1] for a in as_ if not absent(a)))))
    wanted = [*zip(want_das, as_, strict=True), *zip(want_dbs, bs, strict=True)]
    return grads + [like.new_empty(like.shape) for want, like in wanted if want]
