"""One layer in plain PyTorch operators: the same operands as the Triton launchers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.eager.dropout import dropped
from fastlora.eager.thin import add_low_rank_, drop, shrink, thin_dtype, with_bias
from fastlora.reference import dropout_scale

FEW_INPUTS = 2**16
"""M·K up to which calls cost more than arithmetic: `few_rows` instead of our rule, where autograd saves no more."""

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(dx, da, db), each None where nobody asked for it."""


def few_rows(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, lora_bias: Tensor | None, scale: float
) -> Tensor:
    """The layer without dropout on x: [..., K] of few rows, all of one dtype, by autograd's own nodes."""
    return linear(x, w, bias).add_(linear(linear(x, a), b, lora_bias), alpha=scale)


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
    y = linear(x, w, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))
    gone = dropped(seed, x.shape[0], x.shape[1], p) if seed is not None else None
    h = shrink(x, a, gone, p)
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
    gone = dropped(seed, x.shape[0], x.shape[1], p) if seed is not None else None
    h = shrink(x, a, gone, p)
    out = y.to(torch.promote_types(y.dtype, dtype), copy=True, memory_format=torch.contiguous_format)
    return add_low_rank_(out, *with_bias(h, b, lora_bias), scale).to(dtype), h


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
) -> Grads:
    """dx, da, db of the layer (w given) or of the low-rank update alone (w None); only what is wanted is computed.

    x is read for da alone, h for db alone.   Returns dx in dy's dtype, da in a's, db in b's.
    """
    thin = thin_dtype(dy, b)
    dy_thin, b_thin = dy.to(thin), b.to(thin)
    dx = da = db = None
    if want_db and h is not None:
        db = torch.addmm(b_thin, dy_thin.t(), h.to(thin), beta=0, alpha=scale).to(b.dtype)  # β = 0: b unread
    if not (want_dx or want_da):
        return dx, da, db
    M, K = dy.shape[0], a.shape[1]
    gone = None
    if seed is not None:
        gone, scale = dropped(seed, M, K, p), scale * dropout_scale(p)
    unscaled = torch.mm(dy_thin, b_thin)  # dh without its scale, which the next products bring
    if want_da and x is not None:
        thin = thin_dtype(x, a)
        da = torch.addmm(a.to(thin), unscaled.to(thin).t(), drop(x, gone, thin), beta=0, alpha=scale).to(a.dtype)
    if want_dx:
        dx = torch.mm(dy, w) if w is not None else dy.new_zeros((M, K))
        flat = dx.view(-1)
        base = flat[gone] if gone is not None else None  # where x was dropped, only the base's gradient remains
        add_low_rank_(dx, unscaled, a, scale)
        if base is not None:
            flat[gone] = base
    return dx, da, db
