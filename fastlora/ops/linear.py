"""One layer as opaque ops: forward over a plain base, forward over any base's output, and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import eager
from fastlora.ops.library import backend_of_many, fake_h, kernels, lib, plain, rows_of, shaped

lib.define(
    "lora_linear(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, Tensor? lora_bias, Tensor? seed, "
    "float scale, float p, str backend) -> (Tensor, Tensor)"
)
lib.define(
    "lora_update(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? lora_bias, Tensor? seed, "
    "float scale, float p, ScalarType dtype, str backend) -> (Tensor, Tensor)"
)
lib.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor? w, Tensor a, Tensor b, Tensor? h, Tensor? seed, float scale, float p, "
    "bool want_dx, bool want_da, bool want_db, str backend) -> Tensor[]"
)


@torch.library.impl(lib, "lora_linear", "CompositeExplicitAutograd")
def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias.

    x: [..., K], w: [N, K] of one dtype.   a: [R, K], b: [N, R], bias, lora_bias: [N], any float dtype.
    seed: [] int64 on x's device turns dropout p on.   Returns y: [..., N] in x's dtype, h = drop(x)·aᵀ: [M, R] fp32.
    """
    rows = rows_of(x)
    with plain(x):
        if backend == "torch":
            y, h = eager.lora_linear(rows, w, bias, a, b, lora_bias, seed, scale, p)
        else:
            y, h = kernels.lora_linear(rows, w, bias, a, b, lora_bias, seed, scale, p, backend)
    return shaped(y, *x.shape[:-1]), h


@torch.library.register_fake("fastlora::lora_linear", lib=lib)
def _(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], w.shape[0])), fake_h(x, a.shape[0])


@torch.library.impl(lib, "lora_update", "CompositeExplicitAutograd")
def lora_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias over any base output y: [..., N], in `dtype`; operands as above."""
    rows, base = rows_of(x), rows_of(y)
    with plain(x):
        if backend == "torch":
            out, h = eager.lora_update(base, rows, a, b, lora_bias, seed, scale, p, dtype)
        else:
            out, h = kernels.lora_update(base, rows, a, b, lora_bias, seed, scale, p, dtype)
    return shaped(out, *y.shape[:-1]), h


@torch.library.register_fake("fastlora::lora_update", lib=lib)
def _(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape, dtype=dtype), fake_h(x, a.shape[0])


def gradients(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db, each None unless wanted; without w, dx is the low-rank term's alone.

    dy: [..., N], any strides.   x: [..., K], needed for da.   h: [M, R] fp32 as forward returned it, needed for db.
    w, a, b, seed, scale, p: as in forward.   Returns dx: [..., K] in dy's dtype, da: [R, K] in a's, db: [N, R] in b's.
    """
    rows, grads = rows_of(x) if x is not None else None, rows_of(dy)
    backend = backend_of_many(backend, [dy], p > 0)
    with plain(dy):
        if backend == "torch":
            dx, da, db = eager.lora_backward(grads, rows, w, a, b, h, seed, scale, p, want_dx, want_da, want_db)
        else:
            dx, da, db = kernels.lora_backward(
                grads, rows, w, a, b, h, seed, scale, p, want_dx, want_da, want_db, backend
            )
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], a.shape[1])
    return dx, da, db


@torch.library.impl(lib, "lora_backward", "CompositeExplicitAutograd")
def lora_backward(*inputs: Any) -> list[Tensor]:
    """The wanted ones of `gradients`, in order: an op's list has no place for None."""
    return [grad for grad in gradients(*inputs) if grad is not None]


@torch.library.register_fake("fastlora::lora_backward", lib=lib)
def _(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> list[Tensor]:
    grads = []
    if want_dx:
        grads.append(dy.new_empty((*dy.shape[:-1], a.shape[1])))
    return grads + [like.new_empty(like.shape) for want, like in ((want_da, a), (want_db, b)) if want]
