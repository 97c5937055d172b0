"""Products with thin factors on a CPU: the low-rank term lands in the base output in place (no M×N intermediate), and
fp32 adapters on a bf16 base run as one bf16 product of split factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.eager.base import native
from fastlora.eager.dropout import drop
from fastlora.reference import dropout_scale

MANY_OUTPUTS = 2**18
"""M·N from which a bf16 product of split factors, in place, beats an fp32 product rounded once (up to rank 32): below,
an fp32 copy of y fits the caches, and splitting the factors costs more (0.7× of it at M = 128, N = 1024)."""


FEW_GRADS = 2**19
"""M·N up to which dyᵀ·h in fp32 is (hᵀ·dy)ᵀ, copied: 167 µs for 211 at M = 512, N = 1024; 472 for 425 at N = 2048."""


def dear(rows: int, width: int, R: int) -> bool:
    """Whether a CPU's 16-bit product of [rows, width] with a factor of rank R is faster in fp32, copies and all.

    oneDNN's every call costs 13 µs; fewer products are not given to it (ATen's rule), and more repay it. At r = 16 one
    row of K = N = 1024 takes 272 µs, forward and backward, for 329; sixteen rows with dropout 596 for 641.
    """
    return rows * width <= 2**14 and width * R < 2**16 and rows * width * R > 2**12


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def thin_dtype(x: Tensor, f: Tensor) -> torch.dtype:
    """What a product with the adapter's factor f runs in: 16-bit operands of one dtype as they are, as plain torch
    does, unless that is `dear`, or the CPU has no matmul of theirs; all else in fp32."""
    return x.dtype if _as_they_are(x.dtype, len(x), x.shape[1], f) else wide_dtype(x)


def _as_they_are(dtype: torch.dtype, rows: int, width: int, f: Tensor) -> bool:
    return f.dtype == dtype and native(f) and not (f.is_cpu and dear(rows, width, f.numel() // max(width, 1)))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which even where there is nothing to do takes 1 µs; float() takes 1.2 where to() takes 1.7."""
    if t.dtype is dtype:
        return t
    return t.float() if dtype is torch.float32 else t.to(dtype)


def shrink(x: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """h = drop(x)·aᵀ in fp32."""
    thin = thin_dtype(x, a)
    kept = cast(x, thin) if seed is None else drop(x, seed, p, thin)
    h = cast(torch.mm(kept, cast(a, thin).t()), wide_dtype(x))
    return h if seed is None else h.mul_(dropout_scale(p))


def outer(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·dyᵀ·h: [N, R], all of one dtype, as b: [N, R] is, which is not read."""
    if dy.dtype.itemsize == 2 or dy.numel() > FEW_GRADS:
        return torch.addmm(b, dy.t(), h, beta=0, alpha=scale)
    return torch.addmm(b.t(), h.t(), dy, beta=0, alpha=scale).t().contiguous()


def split(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 factors whose product is f·g to 16 bits: [hi hi lo]·[hi lo hi]."""
    f_hi, g_hi = f.bfloat16(), g.bfloat16()
    f_lo, g_lo = (f - f_hi).bfloat16(), (g - g_hi).bfloat16()
    parts = (g_hi, g_lo, g_hi)
    if g.is_contiguous():
        return torch.cat((f_hi, f_hi, f_lo), 1), torch.cat(parts)
    return torch.cat((f_hi, f_hi, f_lo), 1), torch.cat([part.t() for part in parts], 1).t()  # a bᵀ, as it lies


def low_rank(f: Tensor, g: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale·f·g: [M, N] in dtype, or wider.   f: [M, R] fp32, or thin.   g: [R, N]."""
    f, g, scale = _factors(f, g, scale, dtype)
    return torch.addmm(g[:1], f, g, beta=0, alpha=scale)  # β = 0: unread


def add_low_rank_(y: Tensor, f: Tensor, g: Tensor, scale: float) -> Tensor:
    """y += scale·f·g in place, rounded once.   y: [M, N].   f: [M, R] fp32, or thin.   g: [R, N]."""
    return add_product_(y, *_factors(f, g, scale, y.dtype))


def add_product_(y: Tensor, f: Tensor, g: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale·f·g in place, summed in the dtype of f and g, or y's where it holds more, and rounded once."""
    if f.dtype is y.dtype:
        return y.addmm_(f, g, alpha=scale)
    if f.dtype.itemsize <= y.dtype.itemsize:  # an fp32 y over 16-bit factors, or bf16 over fp16's, which overflow
        return y.add_(f.mm(g), alpha=scale)
    return y.copy_(cast(y, f.dtype).addmm_(f, g, alpha=scale))  # of [256, 256] 19 µs, 24 where a sum of f·g is added


def _factors(f: Tensor, g: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """f, g and the scale of their product, as it is best computed for a result in dtype: in dtype, or wider."""
    if dtype == f.dtype:
        return f, cast(g, dtype), scale
    if _as_they_are(dtype, len(f), g.shape[1], g):
        return cast(f, dtype), g, scale
    many = len(f) * g.shape[1] >= MANY_OUTPUTS
    if dtype == torch.bfloat16 and many and len(g) <= 32 and native(f, dtype):
        return *split(f * scale, g), 1.0
    wide = wide_dtype(f)
    return cast(f, wide), cast(g, wide), scale


def with_bias(h: Tensor, b: Tensor, lora_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[h 1] and [b lora_bias]ᵀ: lora_bias as one more rank row."""
    if lora_bias is None:
        return h, b.t()
    return torch.cat((h, h.new_ones(h.shape[0], 1)), 1), torch.cat((b.t(), lora_bias[None, :].to(b.dtype)), 0)
