"""Products with thin factors on a CPU: the low-rank term lands in the base output in place (no M×N intermediate), and
fp32 adapters on a bf16 base run as one bf16 product of split factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.eager.base import native
from fastlora.reference import dropout_scale

FEW_PRODUCTS = 2**15
"""R·K up to which few rows of bf16 or fp16 multiply faster in fp32: a 16-bit product costs 17 µs however small."""

MANY_OUTPUTS = 2**18
"""M·N from which a bf16 product of split factors, in place, beats an fp32 product rounded once (up to rank 32): below,
an fp32 copy of y fits the caches, and splitting the factors costs more (0.7× of it at M = 128, N = 1024)."""


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def thin_dtype(x: Tensor, f: Tensor) -> torch.dtype:
    """What a product with the adapter's factor f runs in: 16-bit operands of one dtype as they are, as plain torch
    does, unless a handful, or the CPU has no matmul of theirs; all else in fp32."""
    if x.dtype != f.dtype or (f.numel() <= FEW_PRODUCTS and x.shape[0] <= 8) or not native(x):
        return wide_dtype(x)
    return x.dtype


def drop(x: Tensor, gone: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in dtype with the elements at positions `gone` selected away, not yet divided by 1−p."""
    if gone is None:
        return x.to(dtype)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1).index_fill_(0, gone, 0).view(x.shape)


def shrink(x: Tensor, a: Tensor, gone: Tensor | None, p: float) -> Tensor:
    """h = drop(x)·aᵀ in fp32."""
    thin = thin_dtype(x, a)
    h = torch.mm(drop(x, gone, thin), a.to(thin).t()).to(wide_dtype(x))
    return h if gone is None else h.mul_(dropout_scale(p))


def split(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 factors whose product is f·g to 16 bits: [hi hi lo]·[hi lo hi]."""
    f_hi, g_hi = f.bfloat16(), g.bfloat16()
    f_lo, g_lo = (f - f_hi).bfloat16(), (g - g_hi).bfloat16()
    return torch.cat((f_hi, f_hi, f_lo), 1), torch.cat((g_hi, g_lo, g_hi), 0)


def add_low_rank_(y: Tensor, f: Tensor, g: Tensor, scale: float) -> Tensor:
    """y += scale·f·g in place, rounded once.   y: [M, N].   f: [M, R] fp32, or thin.   g: [R, N]."""
    if y.dtype == f.dtype:
        return y.addmm_(f, g.to(y.dtype), alpha=scale)
    if thin_dtype(y, g) == y.dtype:
        return y.addmm_(f.to(y.dtype), g, alpha=scale)
    if y.dtype == torch.bfloat16 and y.numel() >= MANY_OUTPUTS and g.shape[0] <= 32 and native(y):
        return y.addmm_(*split(f * scale, g))
    wide = wide_dtype(y)
    return y.copy_(torch.addmm(y.to(wide), f.to(wide), g.to(wide), alpha=scale))


def with_bias(h: Tensor, b: Tensor, lora_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[h 1] and [b lora_bias]ᵀ: lora_bias as one more rank row."""
    if lora_bias is None:
        return h, b.t()
    return torch.cat((h, h.new_ones(h.shape[0], 1)), 1), torch.cat((b.t(), lora_bias[None, :].to(b.dtype)), 0)
