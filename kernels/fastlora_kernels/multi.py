"""The low-rank term of a batch in which every row has an adapter of its own, over pools of rank rows.

An adapter is a run of `rank` rows in `a_pool` and `b_pool`: what is read is in proportion to true rank. Layers that
share an input (q, k, v; gate, up) take one shrink and one expand together. Base rows are neither read nor written. A
row's term is bitwise the same whoever else is in the batch: its tile has a fixed number of rows, and the split of K
depends on the layer alone. Jobs that train take the same kernels with dropout, forward (h, y) and backward (dh, dx).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.dropout import keep
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout, layouts
from fastlora_kernels.routing import TILE_ROWS, Drops, Routes, first_of
from fastlora_kernels.sizes import cdiv, power_of_two
from fastlora_kernels.tables import Tile, tile

SPLIT = 1024
"""Features of one part of the shrink: a function of the layer alone."""

MEMBERS = 3


@triton.jit(do_not_specialize=["M"])
def _multi_shrink_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    tile_ptr,
    start_ptr,
    rank_ptr,
    factor_ptr,
    count_ptr,
    seed_ptr,
    threshold_ptr,
    h_ptr,
    M,
    K,
    G,
    width,
    stride_xm,
    stride_xk,
    stride_ag,
    stride_ar,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[part, member, row, :rank] = x[row, part of K]·a[member, start : start + rank, part of K]ᵀ, for one tile.

    SCALED: times the slot's factor.   DROPOUT: of drop(x), by the slot's seed and threshold.
    """
    pid, member, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.load(tile_ptr + 3 * pid + 2)
    if rows > 0:
        slot = tl.load(tile_ptr + 3 * pid)
        offs_t = tl.arange(0, TILE_ROWS)
        mask_m = offs_t < rows
        first = tl.load(tile_ptr + 3 * pid + 1)
        offs_m = tl.load(order_ptr + first + offs_t, mask=mask_m, other=0).to(tl.int64)
        start = tl.load(start_ptr + slot).to(tl.int64)
        rank = tl.load(rank_ptr + member * G + slot)
        if DROPOUT:
            seed, threshold = tl.load(seed_ptr + slot), tl.load(threshold_ptr + slot)
            offs_own = first - first_of(count_ptr, slot, G, SLOTS) + offs_t
        x_rows = x_ptr + offs_m[:, None] * stride_xm
        h_rows = h_ptr + ((part * tl.num_programs(1) + member).to(tl.int64) * M + offs_m)[:, None] * width
        for r in tl.range(0, rank, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            a_cols = a_ptr + member.to(tl.int64) * stride_ag + (start + offs_r)[None, :] * stride_ar
            acc = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
            for k in tl.range(part * SPLIT, tl.minimum(K, (part + 1) * SPLIT), BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                x = tl.load(
                    x_rows + offs_k.to(tl.int64)[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0
                )
                if DROPOUT:
                    x = tl.where(keep(seed, offs_own, k, threshold, TILE_ROWS, BLOCK_K), x, 0.0)
                a = tl.load(a_cols + offs_k[:, None], mask=mask_k[:, None] & mask_r[None, :], other=0.0)
                acc = dot(x, a, acc, PIECES, INTERPRET, ROUNDED=True)
            if SCALED:
                acc *= tl.load(factor_ptr + slot)
            tl.store(h_rows + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _expand_tile(
    h_ptr,
    b_ptr,
    order_ptr,
    tile_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    biased_ptr,
    count_ptr,
    seed_ptr,
    threshold_ptr,
    y_ptr,
    M,
    N,
    G,
    width,
    stride_ym,
    member,
    DROPOUT: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[row, block] += scaling·(Σ_part h[part, member, row]·b[start : start + rank] + bias row), for one tile.

    DROPOUT: only where the slot's mask keeps, as dx takes it.
    """
    pid, pid_n = tl.program_id(0), tl.program_id(1)
    rows, slot = tl.load(tile_ptr + 3 * pid + 2), tl.load(tile_ptr + 3 * pid)
    rank = tl.load(rank_ptr + member * G + slot)
    if (rows > 0) & (rank > 0) & (pid_n * BLOCK_N < N):
        offs_t = tl.arange(0, TILE_ROWS)
        mask_m = offs_t < rows
        first = tl.load(tile_ptr + 3 * pid + 1)
        offs_m = tl.load(order_ptr + first + offs_t, mask=mask_m, other=0).to(tl.int64)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_m[:, None] & mask_n[None, :]
        y_tile = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        y = tl.load(y_tile, mask=mask, other=0.0)  # first, so that its latency hides behind the product
        start = tl.load(start_ptr + slot).to(tl.int64)
        acc = tl.zeros([TILE_ROWS, BLOCK_N], tl.float32)
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            h = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
            for part in tl.static_range(PARTS):
                h_rows = h_ptr + ((part * MEMBERS + member) * tl.cast(M, tl.int64) + offs_m)[:, None] * width
                h += tl.load(h_rows + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            b_rows = b_ptr + (start + offs_r)[:, None] * N
            b = tl.load(b_rows + offs_n[None, :], mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc = dot(h, b, acc, PIECES, INTERPRET)
        columns = tl.where(tl.load(biased_ptr + member * G + slot) != 0, N, 0)
        bias = tl.load(b_ptr + (start + rank) * N + offs_n, mask=offs_n < columns, other=0.0)
        acc = (acc + bias.to(tl.float32)[None, :]) * tl.load(scaling_ptr + member * G + slot)
        if DROPOUT:
            seed, threshold = tl.load(seed_ptr + slot), tl.load(threshold_ptr + slot)
            offs_own = first - first_of(count_ptr, slot, G, SLOTS) + offs_t
            acc = tl.where(keep(seed, offs_own, pid_n * BLOCK_N, threshold, TILE_ROWS, BLOCK_N), acc, 0.0)
        tl.store(y_tile, cast(acc + y.to(tl.float32), y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _multi_expand_kernel(
    h_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    order_ptr,
    tile_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    biased_ptr,
    count_ptr,
    seed_ptr,
    threshold_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    M,
    N0,
    N1,
    N2,
    G,
    width,
    stride_y0,
    stride_y1,
    stride_y2,
    DROPOUT: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The layers side by side: each program takes its own one's pointers in a branch, as a pointer that a branch
    chooses loses its alignment (and does not compile for AMD)."""
    member = tl.program_id(2)
    if member == 0:
        _expand_tile(
            h_ptr, b0_ptr, order_ptr, tile_ptr, start_ptr, rank_ptr, scaling_ptr, biased_ptr, count_ptr, seed_ptr,
            threshold_ptr, y0_ptr, M, N0, G, width, stride_y0, 0, DROPOUT, SLOTS, PARTS, MEMBERS, PIECES, INTERPRET,
            TILE_ROWS, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    if MEMBERS > 1:
        if member == 1:
            _expand_tile(
                h_ptr, b1_ptr, order_ptr, tile_ptr, start_ptr, rank_ptr, scaling_ptr, biased_ptr, count_ptr, seed_ptr,
                threshold_ptr, y1_ptr, M, N1, G, width, stride_y1, 1, DROPOUT, SLOTS, PARTS, MEMBERS, PIECES, INTERPRET,
                TILE_ROWS, BLOCK_R, BLOCK_N,
            )  # fmt: skip
    if MEMBERS > 2:
        if member == 2:
            _expand_tile(
                h_ptr, b2_ptr, order_ptr, tile_ptr, start_ptr, rank_ptr, scaling_ptr, biased_ptr, count_ptr, seed_ptr,
                threshold_ptr, y2_ptr, M, N2, G, width, stride_y2, 2, DROPOUT, SLOTS, PARTS, MEMBERS, PIECES, INTERPRET,
                TILE_ROWS, BLOCK_R, BLOCK_N,
            )  # fmt: skip


@lru_cache(maxsize=REMEMBERED)
def _shrink_plan(
    at: Place,
    x: Layout,
    a_pool: Layout,
    G: int,
    width: int,
    tiles: int,
    scaled: bool,
    dropout: bool,
    whole: bool,
    config: Tile | None,
) -> tuple[Launch, tuple[int, ...]]:
    """(what is launched, the shape of h)."""
    (M, K), stride_x, dtype = x
    (members, _, _), stride_a, a_dtype = a_pool
    t = config or tile("multi_shrink", at.arch, dtype, M, K)
    split = cdiv(K, t.BLOCK_K) * t.BLOCK_K if whole else SPLIT
    parts, width = cdiv(K, split), cdiv(width, 16) * 16  # so that loads of h are wide
    launch = Launch(
        _multi_shrink_kernel, (tiles, members, parts), (M, K, G, width, *stride_x, *stride_a[:2]), t.options,
        SCALED=scaled, DROPOUT=dropout, SLOTS=power_of_two(G), SPLIT=split,
        PIECES=pieces(dtype, (a_dtype,), torch.float32, at.precision), INTERPRET=INTERPRET,
        TILE_ROWS=TILE_ROWS, BLOCK_R=t.BLOCK_R, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip
    return launch, (parts, members, M, width)


def multi_shrink(
    x: Tensor,
    a_pool: Tensor,
    start: Tensor,
    rank: Tensor,
    width: int,
    routes: Routes,
    *,
    factor: Tensor | None = None,
    drops: Drops | None = None,
    whole: bool = False,
    config: Tile | None = None,
) -> Tensor:
    """h[row] = x[row]·a[start : start + rank]ᵀ for the adapter of each row, of all the layers that share x.

    x: [M, K], any strides.   a_pool: [members, T, K], rank rows of each layer, contiguous.   start: [G] int32, first
    rank row of each slot.   rank: [members, G] int32.   width: at least the largest rank.   routes: of the M rows.
    factor: [G] fp32, on each slot's h.   drops: dropout of x, a slot's own.   whole: one part for all of K.
    Returns h: [parts, members, M, ⌈width/16⌉·16] fp32, to be summed over parts of K; written where a row has a rank,
    and nowhere else.
    """
    launch, shape = _shrink_plan(
        place(x), layout(x), layout(a_pool), len(start), width, len(routes.tiles), factor is not None,
        drops is not None, whole, config,
    )  # fmt: skip
    h = x.new_empty(shape, dtype=torch.float32)
    if h.shape[2]:
        launch(
            (x, a_pool, routes.order, routes.tiles, start, rank, x if factor is None else factor, routes.counts,
             *(drops or (x, x)), h)
        )  # fmt: skip
    return h


@lru_cache(maxsize=REMEMBERED)
def _expand_plan(
    at: Place,
    ys: tuple[Layout, ...],
    h: Layout,
    b_dtype: torch.dtype,
    G: int,
    tiles: int,
    dropout: bool,
    config: Tile | None,
) -> Launch:
    M, dtype, members = ys[0][0][0], ys[0][2], len(ys)
    widest = max(shape[1] for shape, _, _ in ys)
    t = config or tile("multi_expand", at.arch, dtype, M, widest)
    three = [ys[min(i, members - 1)] for i in range(MEMBERS)]
    return Launch(
        _multi_expand_kernel, (tiles, cdiv(widest, t.BLOCK_N), members),
        (M, *(shape[1] for shape, _, _ in three), G, h[0][3], *(stride[0] for _, stride, _ in three)), t.options,
        DROPOUT=dropout, SLOTS=power_of_two(G), PARTS=h[0][0], MEMBERS=members,
        PIECES=pieces(dtype, (torch.float32, b_dtype), dtype, at.precision),
        INTERPRET=INTERPRET, TILE_ROWS=TILE_ROWS, BLOCK_R=t.BLOCK_R, BLOCK_N=t.BLOCK_N,
    )  # fmt: skip


def multi_expand(
    ys: Sequence[Tensor],
    h: Tensor,
    b_pools: Sequence[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    routes: Routes,
    *,
    drops: Drops | None = None,
    config: Tile | None = None,
) -> None:
    """y[row] += scaling·(h[row]·b[start : start + rank] + bias) in place, for up to three layers in one launch.

    ys: [M, N] each, base outputs of any float dtype, inner stride 1.   h: as `multi_shrink` left it.   b_pools: [T, N]
    each, contiguous; where biased: [members, G] int32 is set, the row after an adapter's last holds its lora_bias.
    scaling: [members, G] fp32.   A layer whose adapter has rank 0 is left alone.   drops: only kept elements get it.
    """
    if len(ys[0]) == 0:
        return
    launch = _expand_plan(
        place(h), layouts(ys), layout(h), b_pools[0].dtype, len(start), len(routes.tiles), drops is not None, config
    )
    three = [min(i, len(ys) - 1) for i in range(MEMBERS)]
    launch(
        (h, *[b_pools[i] for i in three], routes.order, routes.tiles, start, rank, scaling, biased, routes.counts,
         *(drops or (h, h)), *[ys[i] for i in three])
    )  # fmt: skip
