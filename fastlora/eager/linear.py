"""One layer in plain PyTorch operators: the same operands as the Triton launchers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.eager import few
from fastlora.eager.base import project, pull_back
from fastlora.eager.dropout import drop, drop_
from fastlora.eager.thin import add_low_rank_, cast, low_rank, outer, shrink, thin_dtype, wide_dtype, with_bias
from fastlora.reference import dropout_scale


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
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias.   Returns y: [M, N] in x's dtype, h: [M, R] fp32."""
    if few.applies(x, x.numel()):
        y, h = few.forward(x, w, bias, a, b, lora_bias, seed, scale, p)
        return y, cast(h, wide_dtype(x))
    y = project(x, w, bias)
    h = shrink(x, a, seed, p)
    return add_low_rank_(y, *with_bias(h, b, lora_bias), scale), h


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
) -> tuple[Tensor, Tensor]:
    """y + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias over any base output y.   Returns [M, N] in dtype, h: [M, R] fp32."""
    out = y.to(torch.promote_types(y.dtype, dtype), copy=True, memory_format=torch.contiguous_format)
    if few.applies(x, x.numel()):
        h = few.add_update_(out, x, a, b, lora_bias, seed, scale, p)
        return cast(out, dtype), cast(h, wide_dtype(x))
    h = shrink(x, a, seed, p)
    return cast(add_low_rank_(out, *with_bias(h, b, lora_bias), scale), dtype), h


def lora_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db of the layer (w given) or of the low-rank update alone (w None), each None unless wanted.

    x is read for da alone, h for db alone.   Returns dx in dy's dtype, da in a's, db in b's.
    """
    M, K = dy.shape[0], a.shape[1]
    if few.applies(dy, M * K):
        return few.backward(dy, x, w, a, b, h, seed, scale, p, want_dx, want_da, want_db)
    thin = thin_dtype(dy, b)
    dy_thin, b_thin = cast(dy, thin), cast(b, thin)
    dx = da = db = None
    if want_db and h is not None:
        db = cast(outer(dy_thin, cast(h, thin), b_thin, scale), b.dtype)
    if not (want_dx or want_da):
        return dx, da, db
    unscaled = torch.mm(dy_thin, b_thin)  # dh without its scale, which the next products bring
    if seed is not None:
        scale *= dropout_scale(p)
    if want_da and x is not None:
        thin = thin_dtype(x, a)
        kept = cast(x, thin) if seed is None else drop(x, seed, p, thin)
        da = torch.addmm(cast(a, thin), cast(unscaled, thin).t(), kept, beta=0, alpha=scale)  # β = 0: a unread
        da = cast(da, a.dtype)
        del kept  # before dx is made
    if want_dx and seed is not None:
        term = drop_(low_rank(unscaled, a, scale, dy.dtype), seed, p)
        dx = pull_back((dy, w), onto=term) if w is not None else cast(term, dy.dtype)
    elif want_dx:
        dx = pull_back((dy, w)) if w is not None else dy.new_zeros((M, K))
        add_low_rank_(dx, unscaled, a, scale)
    return dx, da, db
