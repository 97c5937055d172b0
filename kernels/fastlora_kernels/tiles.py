"""The two thin products every pass is made of, each one tile's loop over the long axis.

shrink_tile contracts the features (h = drop(x)·aᵀ, dh = dy·b); outer_tile contracts the rows (da = dhᵀ·drop(x),
db = dyᵀ·h). Both read their big operand `x` once, as it lies, and accumulate in fp32. Several factors `f` share that
reading, each under a mask of its own: what is a tuple here has an element a factor.
"""

# a tuple grows in the unrolled loops:
# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels.dot import dot
from fastlora_kernels.dropout import keep, keep_and_leave


@triton.jit
def _seed(seeds_ptr, AT: tl.constexpr):
    """The seed of a factor's mask, seeds[AT]; 0, never used, where AT is −1: no mask."""
    if AT >= 0:
        return tl.load(seeds_ptr + AT)
    else:
        return tl.zeros([], tl.int64)


@triton.jit
def _drop(x, seed, offs_m, col_start, threshold, AT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """x under a factor's mask; dropped values are selected away."""
    if AT >= 0:
        x = tl.where(keep(seed, offs_m, col_start, threshold, BLOCK_M, BLOCK_K), x, 0.0)
    return x


@triton.jit
def ranks_at(pid_r, BLOCK_R: tl.constexpr):
    """The ranks of a block."""
    return pid_r * BLOCK_R + tl.arange(0, BLOCK_R)


@triton.jit
def _none(ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    return tl.zeros([ROWS, BLOCK_R], tl.float32)


@triton.jit
def shrink_tile(
    x_ptr,
    f_ptrs,
    seeds_ptr,
    M,
    K,
    Rs,
    stride_xm,
    stride_xk,
    strides_fk,
    strides_fr,
    pid_m,
    pid_r,
    k_start,
    k_end,
    thresholds,
    SEEDS,
    PIECES,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] of drop(x)·f, one a factor, over the features k_start…k_end.

    Both are multiples of BLOCK_K unless k_end is K. The mask compares with K, not k_end: K is known to be a multiple
    of 16 where it is one, so that loads stay wide.
    """
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    seeds = ()
    f_cols = ()
    accs = ()
    for i in tl.static_range(len(f_ptrs)):
        seeds = seeds + (_seed(seeds_ptr, SEEDS[i]),)
        f_cols = f_cols + (f_ptrs[i] + ranks_at(pid_r, BLOCK_R[i]).to(tl.int64)[None, :] * strides_fr[i],)
        accs = accs + (_none(BLOCK_M, BLOCK_R[i]),)
    for k in tl.range(k_start, k_end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_tile = x_rows + tl.cast(k, tl.int64) * stride_xk + tl.arange(0, BLOCK_K).to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(len(f_ptrs)):
            mask_r = ranks_at(pid_r, BLOCK_R[i]) < Rs[i]
            dropped = _drop(x, seeds[i], offs_m, k, thresholds[i], SEEDS[i], BLOCK_M, BLOCK_K)
            f_tile = f_cols[i] + offs_k.to(tl.int64)[:, None] * strides_fk[i]
            f = tl.load(f_tile, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            sums = sums + (dot(dropped, f, accs[i], PIECES[i], INTERPRET, ROUNDED=True),)
        accs = sums
    return accs


@triton.jit
def outer_tile(
    x_ptr,
    f_ptrs,
    seeds_ptr,
    bits_ptr,
    M,
    K,
    Rs,
    bits_width,
    stride_xm,
    stride_xk,
    strides_fm,
    strides_fr,
    pid_k,
    pid_r,
    m_start,
    m_end,
    thresholds,
    SEEDS,
    BITS: tl.constexpr,
    PIECES,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_R] of drop(x)ᵀ·f, one a factor, over the rows m_start…m_end.

    BITS: the masks are left in bits[seed's number], by the program of the first ranks.
    """
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    x_cols = x_ptr + offs_k.to(tl.int64)[None, :] * stride_xk
    seeds = ()
    f_cols = ()
    accs = ()
    for i in tl.static_range(len(f_ptrs)):
        seeds = seeds + (_seed(seeds_ptr, SEEDS[i]),)
        f_cols = f_cols + (f_ptrs[i] + ranks_at(pid_r, BLOCK_R[i])[None, :] * strides_fr[i],)
        accs = accs + (_none(BLOCK_K, BLOCK_R[i]),)
    for m in tl.range(m_start, m_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m_end
        rows = offs_m.to(tl.int64)[:, None]
        x = tl.load(x_cols + rows * stride_xm, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(len(f_ptrs)):
            mask_r = ranks_at(pid_r, BLOCK_R[i]) < Rs[i]
            if BITS and SEEDS[i] >= 0:
                kept = keep_and_leave(
                    seeds[i], bits_ptr + tl.cast(M, tl.int64) * bits_width * SEEDS[i], bits_width, offs_m, mask_m,
                    pid_k * BLOCK_K, thresholds[i], pid_r, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                dropped = tl.where(kept, x, 0.0)
            else:
                dropped = _drop(x, seeds[i], offs_m, pid_k * BLOCK_K, thresholds[i], SEEDS[i], BLOCK_M, BLOCK_K)
            f = tl.load(f_cols[i] + rows * strides_fm[i], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            sums = sums + (dot(tl.trans(dropped), f, accs[i], PIECES[i], INTERPRET, ROUNDED=True),)
        accs = sums
    return accs
