"""What both forms of the GEMM begin with: which tile of y is next, and its low-rank terms, ready for the main loop.

The term is scaled, or masked for dx, in fp32 before the main loop starts: a tail that masks its own accumulator spills
at 128×256. The rank is walked in blocks with num_stages=1; one block of padded rank 512 would need 256 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.dot import dot
from fastlora_kernels.dropout import keep_in_turn, kept_before
from fastlora_kernels.launch import Layout, layout, layouts
from fastlora_kernels.tables import Tile


class Terms(NamedTuple):
    """What the prologue sums: mask_i ⊙ scale_i·(h_i·b_iᵀ), one a member of a group, or one with a lora_bias.

    hs: [M, R] fp32 each, bs: [N, R] each.   masks: the seeds they are drawn from, or the bits that the x pass left;
    drops: which of them each member's is, −1 for none, and those behind the others.   thresholds: of each mask.
    """

    hs: Sequence[Tensor]
    bs: Sequence[Tensor]
    scales: tuple[float, ...]
    lora_bias: Tensor | None = None
    masks: Tensor | None = None
    drops: tuple[int, ...] = (-1,)
    thresholds: tuple[int, ...] = (0,)

    def planned(self) -> PlannedTerms:
        """What a plan may look at."""
        hs, bs, scales, lora_bias, masks, drops, thresholds = self
        bias = None if lora_bias is None else layout(lora_bias)
        return PlannedTerms(
            layouts(hs), layouts(bs), scales, bias, None if masks is None else layout(masks), drops, thresholds
        )


class PlannedTerms(NamedTuple):
    """`Terms` with layouts for tensors."""

    hs: tuple[Layout, ...]
    bs: tuple[Layout, ...]
    scales: tuple[float, ...]
    lora_bias: Layout | None
    masks: Layout | None
    drops: tuple[int, ...]
    thresholds: tuple[int, ...]

    @property
    def bits_width(self) -> int | None:
        """Bytes of a row of the bits that the x pass left; None where masks are drawn: a 0 would take a register."""
        return self.masks[0][2] if self.masks is not None and self.masks[2] == torch.uint8 else None

    @property
    def rank(self) -> int:
        """The largest."""
        return max(shape[1] for shape, _, _ in self.hs)

    @property
    def masked(self) -> int:
        """How many are masked."""
        return sum(at >= 0 for at in self.drops)

    @property
    def factors(self) -> tuple[torch.dtype, ...]:
        """dtypes of what is multiplied."""
        return torch.float32, *(dtype for _, _, dtype in self.bs)


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
def _add_step(
    h_rows,
    b_cols,
    acc,
    r,
    R,
    stride_hr,
    stride_br,
    mask_m,
    mask_n,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + h·bᵀ over the ranks from r."""
    offs_r = r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    h = tl.load(h_rows + offs_r[None, :] * stride_hr, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    b = tl.load(b_cols + offs_r.to(tl.int64)[:, None] * stride_br, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    return dot(h, b, acc, PIECES, INTERPRET)


@triton.jit
def _add_product(
    h_ptr,
    b_ptr,
    acc,
    R,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    ONE_STEP: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + h·bᵀ of one tile, over all ranks.   ONE_STEP: R is at most BLOCK_R, and no loop is wanted."""
    h_rows = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    b_cols = b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn
    if ONE_STEP:
        acc = _add_step(h_rows, b_cols, acc, 0, R, stride_hr, stride_br, mask_m, mask_n, PIECES, INTERPRET, BLOCK_R)
    else:
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            acc = _add_step(h_rows, b_cols, acc, r, R, stride_hr, stride_br, mask_m, mask_n, PIECES, INTERPRET, BLOCK_R)
    return acc


@triton.jit
def low_rank_tile(
    h_ptrs,
    b_ptrs,
    lora_bias_ptr,
    masks_ptr,
    M,
    N,
    Rs,
    bits_width,
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
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of Σ mask ⊙ scale·(h·bᵀ) in fp32; rows past M and columns past N hold no NaN.

    BITS: masks_ptr leads to the bits of the masks, not to their seeds.

    The masked members come first (see `Terms`): the first of them is masked in the accumulator itself, each further one
    in a second accumulator. A member without a mask (of several: without a scale) is added in place; a lora_bias is a
    single one's.
    """
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(h_ptrs)):
        term = acc if DROPS[i] < 0 else tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        term = _add_product(
            h_ptrs[i], b_ptrs[i], term, Rs[i], strides_hm[i], strides_hr[i], strides_bn[i], strides_br[i],
            offs_m, offs_n, mask_m, mask_n, ONE_STEP, PIECES, INTERPRET, BLOCK_R,
        )  # fmt: skip
        if HAS_LORA_BIAS:
            lora_bias = tl.load(lora_bias_ptr + offs_n * stride_lora_bias, mask=mask_n, other=0.0)
            term += lora_bias.to(tl.float32)[None, :]
        if DROPS[i] >= 0 or len(h_ptrs) == 1:
            term *= tl.cast(scales[i], tl.float32)
        if DROPS[i] >= 0:
            if BITS:
                bits_ptr = masks_ptr + tl.cast(M, tl.int64) * bits_width * DROPS[i]
                kept = kept_before(bits_ptr, bits_width, offs_m, mask_m, pid_n * BLOCK_N, BLOCK_M, BLOCK_N)
            else:
                seed = tl.load(masks_ptr + DROPS[i])
                kept = keep_in_turn(seed, offs_m, pid_n * BLOCK_N, thresholds[i], BLOCK_M, BLOCK_N)
            term = tl.where(kept, term, 0.0)
        acc = acc + term if DROPS[i] >= 0 and i > 0 else term
    return acc
