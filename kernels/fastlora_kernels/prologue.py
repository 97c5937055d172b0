"""What both forms of the GEMM begin with: which tile of y is next, and its low-rank terms, ready for the main loop.

The term is scaled, or masked for dx, in fp32 before the main loop starts: a tail that masks its own accumulator spills
at 128×256. The rank is walked in blocks with num_stages=1; one block of padded rank 512 would need 256 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.dot import dot
from fastlora_kernels.dropout import keep, keep_by_halves
from fastlora_kernels.tables import Tile


@dataclass(frozen=True)
class Terms:
    """What the prologue sums: mask_i ⊙ scale_i·(h_i·b_iᵀ), one a member of a group, or one with a lora_bias.

    hs: [M, R] fp32 each, bs: [N, R] each.   seeds: what masks are drawn from; drops: which of them each member's is,
    −1 for none.   thresholds: of each mask.
    """

    hs: Sequence[Tensor]
    bs: Sequence[Tensor]
    scales: Sequence[float]
    lora_bias: Tensor | None = None
    seeds: Tensor | None = None
    drops: tuple[int, ...] = (-1,)
    thresholds: tuple[int, ...] = (0,)

    @property
    def rank(self) -> int:
        """The largest."""
        return max(h.shape[1] for h in self.hs)


def rank_step(R: int, t: Tile) -> int:
    """How many ranks a step of the prologue takes: the tile's BLOCK_R, or 16 where R is no more."""
    return 16 if R <= 16 else t.BLOCK_R


@triton.jit
def tile_at(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of the tile that comes pid-th: blocks of GROUP_M rows share their columns of w in L2."""
    grid_m, grid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * grid_n)
    in_group = pid % (GROUP_M * grid_n)
    group_m = tl.minimum(grid_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % group_m, in_group // group_m


@triton.jit
def low_rank_tile(
    h_ptr,
    b_ptr,
    lora_bias_ptr,
    seed_ptr,
    M,
    N,
    R,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    stride_lora_bias,
    pid_m,
    pid_n,
    scale,
    threshold,
    HAS_LORA_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BY_HALVES: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of mask ⊙ scale·(h·bᵀ + lora_bias) in fp32; rows past M and columns past N hold no NaN.

    BY_HALVES: at 128×256 on sm_90 the persistent kernel spills 8 bytes without it, the plain one 64 with it (Triton
    3.6.0, fp32 adapters).
    """
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h_rows = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    b_cols = b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        h = tl.load(h_rows + offs_r[None, :] * stride_hr, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(
            b_cols + offs_r.to(tl.int64)[:, None] * stride_br, mask=mask_r[:, None] & mask_n[None, :], other=0.0
        )
        acc = dot(h, b, acc, PIECES, INTERPRET)
    if HAS_LORA_BIAS:
        lora_bias = tl.load(lora_bias_ptr + offs_n * stride_lora_bias, mask=mask_n, other=0.0)
        acc += lora_bias.to(tl.float32)[None, :]
    acc *= tl.cast(scale, tl.float32)
    if DROPOUT:
        if BY_HALVES:
            kept = keep_by_halves(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
        else:
            kept = keep(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(kept, acc, 0.0)
    return acc


@triton.jit
def low_rank_tiles(
    h_ptrs,
    b_ptrs,
    lora_bias_ptr,
    seeds_ptr,
    M,
    N,
    Rs,
    strides_hm,
    strides_hr,
    strides_bn,
    strides_br,
    stride_lora_bias,
    pid_m,
    pid_n,
    scales,
    thresholds,
    HAS_LORA_BIAS: tl.constexpr,
    SEEDS: tl.constexpr,
    BY_HALVES: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The members' `low_rank_tile`s, added up in their order; a lora_bias is the first one's."""
    for i in tl.static_range(len(h_ptrs)):
        AT: tl.constexpr = SEEDS[i]
        term = low_rank_tile(
            h_ptrs[i], b_ptrs[i], lora_bias_ptr, seeds_ptr + max(AT, 0), M, N, Rs[i],
            strides_hm[i], strides_hr[i], strides_bn[i], strides_br[i], stride_lora_bias,
            pid_m, pid_n, scales[i], thresholds[i],
            HAS_LORA_BIAS and i == 0, AT >= 0, BY_HALVES, PIECES, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc = term if i == 0 else acc + term
    return acc
