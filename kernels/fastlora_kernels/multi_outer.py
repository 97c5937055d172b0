"""da and db of jobs that share a batch: the product of two operands over each job's own rows, one launch for all jobs.

Rows are taken in the order of the routing, in bands of a fixed number of a job's own rows, each summed by one program
and the bands in their order: no atomics, and bitwise the same sum whoever else is in the batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.dropout import keep
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout
from fastlora_kernels.reduce import reduce
from fastlora_kernels.routing import Drops, Routes, first_of
from fastlora_kernels.sizes import cdiv, power_of_two
from fastlora_kernels.tables import Tile, tile

BAND = 1024
"""Rows of one job that a program sums: a job of few rows has no partial sums, one of 8192 eight times the programs."""


@triton.jit(do_not_specialize=["M", "T"])
def _multi_outer_kernel(
    x_ptr,
    f_ptr,
    order_ptr,
    count_ptr,
    start_ptr,
    rank_ptr,
    biased_ptr,
    factor_ptr,
    seed_ptr,
    threshold_ptr,
    out_ptr,
    M,
    K,
    G,
    T,
    width,
    stride_xm,
    stride_xk,
    BY_FEATURE: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLOTS: tl.constexpr,
    BAND: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[band, start : start + rank, block] = factor·Σ_row f[row, :rank]ᵀ·drop(x)[row, block], and where biased one
    row more, factor·Σ_row x[row, block].   A slot's rank·K elements stay below 2³¹."""
    pid_k, band = tl.program_id(0), tl.program_id(2)
    slot, pid_r = tl.program_id(1) % G, tl.program_id(1) // G
    rank, biased = tl.load(rank_ptr + slot), tl.load(biased_ptr + slot)
    if pid_r * BLOCK_R < rank + biased:
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_k = offs_k < K
        x_cols = x_ptr + offs_k.to(tl.int64)[None, :] * stride_xk
        first, count = first_of(count_ptr, slot, G, SLOTS), tl.load(count_ptr + slot)
        if DROPOUT:
            seed, threshold = tl.load(seed_ptr + slot), tl.load(threshold_ptr + slot)
        acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
        for m in tl.range(band * BAND, tl.minimum(count, (band + 1) * BAND), BLOCK_M):
            offs_own = m + tl.arange(0, BLOCK_M)
            mask_m = offs_own < count
            rows = tl.load(order_ptr + first + offs_own, mask=mask_m, other=0).to(tl.int64)[:, None]
            x = tl.load(x_cols + rows * stride_xm, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            if DROPOUT:
                x = tl.where(keep(seed, offs_own, pid_k * BLOCK_K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
            f = tl.load(
                f_ptr + rows * width + offs_r[None, :], mask=mask_m[:, None] & (offs_r < rank)[None, :], other=0.0
            )
            f = tl.where(mask_m[:, None] & ((offs_r == rank) & (biased != 0))[None, :], 1.0, f)
            acc = dot(tl.trans(x), f, acc, PIECES, INTERPRET, ROUNDED=True)
        acc *= tl.load(factor_ptr + slot)
        start = tl.load(start_ptr + slot)
        out_rows = out_ptr + (band.to(tl.int64) * T + start) * K
        if BY_FEATURE:  # [K, rank], as b lies, and then the row of a lora_bias
            own = tl.where(
                (offs_r < rank)[None, :], offs_k[:, None] * rank + offs_r[None, :], rank * K + offs_k[:, None]
            )
        else:
            own = offs_r[None, :] * K + offs_k[:, None]
        mask = mask_k[:, None] & (offs_r < rank + biased)[None, :]
        tl.store(out_rows + own, cast(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    x: Layout,
    width: int,
    G: int,
    rows: int,
    dtype: torch.dtype,
    by_feature: bool,
    dropout: bool,
    config: Tile | None,
) -> tuple[Launch | None, int]:
    """(what is launched, how many bands of rows it sums apart)."""
    (M, K), stride_x, main = x
    if M * K * rows == 0:
        return None, 1
    t, bands = config or tile("multi_outer", at.arch, main, M, K), cdiv(M, BAND)
    launch = Launch(
        _multi_outer_kernel, (cdiv(K, t.BLOCK_K), G * cdiv(width + 1, t.BLOCK_R), bands),
        (M, K, G, rows, width, *stride_x), t.options, BY_FEATURE=by_feature, DROPOUT=dropout, SLOTS=power_of_two(G),
        BAND=BAND, PIECES=pieces(main, (torch.float32,), dtype, at.precision), INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_R=t.BLOCK_R, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip
    return launch, bands


def multi_outer(
    x: Tensor,
    f: Tensor,
    start: Tensor,
    rank: Tensor,
    biased: Tensor,
    factor: Tensor,
    rows: int,
    routes: Routes,
    dtype: torch.dtype,
    *,
    by_feature: bool = False,
    drops: Drops | None = None,
    config: Tile | None = None,
) -> Tensor:
    """out[start : start + rank] = factor·Σ f[row, :rank]ᵀ·drop(x)[row] over each slot's rows: da and db as rank rows.

    x: [M, K], any strides.   f: [M, width] fp32, contiguous, read on the slots' rows alone.   start, rank, biased: [G]
    int32, where a slot's rows of the result lie; where biased, one more holds factor·Σ x[row], of f ≡ 1.   factor: [G]
    fp32.   rows: T, of all slots together.   by_feature: a slot's rank·K elements lie as [K, rank], b's own layout.
    drops: as in `multi_shrink`.   Returns [T, K] in dtype, zero for a slot without a row.
    """
    K = x.shape[1]
    launch, bands = _plan(
        place(x), layout(x), f.shape[1], len(start), rows, dtype, by_feature, drops is not None, config
    )
    out = x.new_empty((rows, K), dtype=dtype)
    if launch is None:
        return out.zero_()
    sums = x.new_empty((bands, rows, K), dtype=torch.float32) if bands > 1 else out
    launch((x, f, routes.order, routes.counts, start, rank, biased, factor, *(drops or (x, x)), sums))
    return out if sums is out else reduce(sums, out)
