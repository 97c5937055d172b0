"""The torch backend: the layer in plain PyTorch operators, arranged for a CPU.

Same operands as the Triton launchers. What it saves over PEFT's formulation: the low-rank term lands in the base
output in place (no M×N intermediate), products with fp32 adapters on a bf16 base run as one bf16 product of split
factors, and dropout draws the gaps between dropped elements instead of one number an element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import reference
from fastlora.reference import dropout_scale

FEW_INPUTS = 2**16
"""M·K up to which calls cost more than arithmetic: `few_rows` instead of our rule, where autograd saves no more."""

FEW_PRODUCTS = 2**15
"""R·K up to which few rows of bf16 or fp16 multiply faster in fp32: a 16-bit product costs 17 µs however small."""

FEW_ELEMENTS = 2**12
"""M·K up to which a bit an element, from 16-bit lanes, is drawn faster than the gaps: fewer calls."""

FEW_DRAWS = 1024
"""Up to here one `geometric_` call draws the gaps faster than five vectorised ones."""

MANY_OUTPUTS = 2**17
"""M·N from which a bf16 product of split factors, in place, beats an fp32 product rounded once (up to rank 32)."""

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(dx, da, db), each None where nobody asked for it."""


def dropped(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """What dropout takes from an [M, K] tensor, as an index into it flattened: positions, or a bool for each element.

    The same for the same seed; from a stream of the CPU's own where seed is on a CPU.
    """
    if M * K > FEW_ELEMENTS or seed.device.type != "cpu":
        return holes(seed, M, K, p)
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(-(-M * K // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: M * K] < reference.dropout_threshold(p) - 2**15


def holes(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Flat positions of the dropped elements of an [M, K] tensor, ascending, the same for the same seed.

    On a CPU the gaps between them are drawn (geometric, so each element is dropped with probability p, independently):
    p·M·K numbers instead of M·K, from a stream of the CPU's own. Elsewhere they are `reference.dropout_mask`'s.
    """
    if seed.device.type != "cpu":
        return (~reference.dropout_mask(seed, M, K, p)).view(-1).nonzero().view(-1)
    size = M * K
    generator = torch.Generator().manual_seed(int(seed))
    expected = size * p
    draws = int(expected + 6 * math.sqrt(expected * (1 - p)) + 16)  # six sigma: one pass is enough
    runs, end = [], -1
    while end < size:
        runs.append(_gaps(draws, p, generator).cumsum_(0).add_(end))
        end = int(runs[-1][-1])
    positions = runs[0] if len(runs) == 1 else torch.cat(runs)
    return positions[: int(torch.searchsorted(positions, size))]


def _gaps(draws: int, p: float, generator: torch.Generator) -> Tensor:
    """How far each dropped element lies from the one before it: geometric, from 1."""
    if draws <= FEW_DRAWS:
        return torch.empty(draws, dtype=torch.int64).geometric_(p, generator=generator)
    gaps = torch.rand(draws, generator=generator).neg_().log1p_()  # u in [0, 1) has 24 bits: log1p(-u) is finite
    return gaps.mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _thin(x: Tensor, f: Tensor) -> torch.dtype:
    """What a product with the adapter's factor f runs in: 16-bit operands of one dtype as they are, as plain torch
    does, unless a handful; all else in fp32."""
    if x.dtype != f.dtype or (f.numel() <= FEW_PRODUCTS and x.shape[0] <= 8):
        return _wide(x)
    return x.dtype


def _drop(x: Tensor, gone: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in dtype with the elements `gone` selected away, not yet divided by 1−p."""
    if gone is None:
        return x.to(dtype)
    if gone.dtype is torch.bool:
        return x.to(dtype).masked_fill(gone.view(x.shape), 0)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1).index_fill_(0, gone, 0).view(x.shape)


def _shrink(x: Tensor, a: Tensor, gone: Tensor | None, p: float) -> Tensor:
    """h = drop(x)·aᵀ in fp32."""
    thin = _thin(x, a)
    h = torch.mm(_drop(x, gone, thin), a.to(thin).t()).to(_wide(x))
    return h if gone is None else h.mul_(dropout_scale(p))


def _split(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 factors whose product is f·g to 16 bits: [hi hi lo]·[hi lo hi]."""
    f_hi, g_hi = f.bfloat16(), g.bfloat16()
    f_lo, g_lo = (f - f_hi).bfloat16(), (g - g_hi).bfloat16()
    return torch.cat((f_hi, f_hi, f_lo), 1), torch.cat((g_hi, g_lo, g_hi), 0)


def _add_low_rank_(y: Tensor, f: Tensor, g: Tensor, scale: float) -> Tensor:
    """y += scale·f·g in place, rounded once.   y: [M, N].   f: [M, R] fp32, or thin.   g: [R, N]."""
    if y.dtype == f.dtype:
        return y.addmm_(f, g.to(y.dtype), alpha=scale)
    if _thin(y, g) == y.dtype:
        return y.addmm_(f.to(y.dtype), g, alpha=scale)
    if y.dtype == torch.bfloat16 and y.numel() >= MANY_OUTPUTS and g.shape[0] <= 32:
        return y.addmm_(*_split(f * scale, g))
    wide = _wide(y)
    return y.copy_(torch.addmm(y.to(wide), f.to(wide), g.to(wide), alpha=scale))


def _with_bias(h: Tensor, b: Tensor, lora_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[h 1] and [b lora_bias]ᵀ: lora_bias as one more rank row."""
    if lora_bias is None:
        return h, b.t()
    return torch.cat((h, h.new_ones(h.shape[0], 1)), 1), torch.cat((b.t(), lora_bias[None, :].to(b.dtype)), 0)


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
    h = _shrink(x, a, gone, p)
    return _add_low_rank_(y, *_with_bias(h, b, lora_bias), scale), h


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
    h = _shrink(x, a, gone, p)
    out = y.to(torch.promote_types(y.dtype, dtype), copy=True, memory_format=torch.contiguous_format)
    return _add_low_rank_(out, *_with_bias(h, b, lora_bias), scale).to(dtype), h


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
    thin = _thin(dy, b)
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
        thin = _thin(x, a)
        da = torch.addmm(a.to(thin), unscaled.to(thin).t(), _drop(x, gone, thin), beta=0, alpha=scale).to(a.dtype)
    if want_dx:
        dx = torch.mm(dy, w) if w is not None else dy.new_zeros((M, K))
        flat = dx.view(-1)
        base = flat[gone] if gone is not None else None  # where x was dropped, only the base's gradient remains
        _add_low_rank_(dx, unscaled, a, scale)
        if base is not None:
            flat[gone] = base
    return dx, da, db


def multi_update_(
    ys: list[Tensor],
    x: Tensor,
    requests: int,
    rows: Tensor | None,
    a: Tensor,
    bs: list[Tensor],
    biases: list[Tensor | None],
) -> None:
    """y += x·aᵀ·b + bias in place, each request with its own factors, for layers that share x; no loop over adapters.

    ys: [..., N] each, x: [..., K], as many rows for each of `requests`.   rows: the requests that have an adapter, None
    for all.   a: [B, members·width, K], bs: [B, width, N], scaled, biases: [B, 1, N], in the order of those requests;
    B = 1 where they share one adapter.
    """
    B, K = len(a), x.shape[-1]
    mine = x if rows is None else x.reshape(requests, -1, K)[rows]
    tokens = mine.reshape(B, -1, K)  # one adapter for all makes one long row
    if tokens.dtype != a.dtype:
        thin = torch.promote_types(tokens.dtype, a.dtype)
        tokens, a = tokens.to(thin), a.to(thin)
    if tokens.shape[1] == 1:  # one token a request: 50 GB/s of factors this way round, 30 the other
        h = torch.bmm(a, tokens.transpose(1, 2)).transpose(1, 2)
    else:
        h = torch.bmm(tokens, a.transpose(1, 2))
    parts = h.split(a.shape[1] // len(ys), 2) if len(ys) > 1 else (h,)
    for y, part, b, bias in zip(ys, parts, bs, biases, strict=True):
        N = y.shape[-1]
        target = y if rows is None else y.view(requests, -1, N)[rows]
        flat = target.view(B, -1, N)
        if flat.dtype == b.dtype == part.dtype:
            flat.baddbmm_(part, b)
            if bias is not None:
                flat.add_(bias)
        else:
            sums = torch.baddbmm(flat.to(b.dtype), part.to(b.dtype), b)
            flat.copy_(sums if bias is None else sums.add_(bias))
        if rows is not None:
            y.view(requests, -1, N).index_copy_(0, rows, target)
