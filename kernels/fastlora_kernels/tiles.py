"""The two thin products every pass is made of, each one tile's loop over the long axis.

shrink_tile contracts the features (h = drop(x)·aᵀ, dh = dy·b); outer_tile contracts the rows (da = dhᵀ·drop(x),
db = dyᵀ·h). Both read their big operand `x` once, as it lies, and accumulate in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels.dot import dot
from fastlora_kernels.dropout import keep


@triton.jit
def shrink_tile(
    x_ptr,
    f_ptr,
    seed_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_fk,
    stride_fr,
    pid_m,
    pid_r,
    k_start,
    k_end,
    threshold,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_R] of drop(x)·f over the features k_start…k_end, both multiples of BLOCK_K unless k_end is K.

    The mask compares with K, not k_end: K is known to be a multiple of 16 where it is one, so that loads stay wide.
    """
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    f_cols = f_ptr + offs_r.to(tl.int64)[None, :] * stride_fr
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in tl.range(k_start, k_end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_tile = x_rows + tl.cast(k, tl.int64) * stride_xk + tl.arange(0, BLOCK_K)[None, :] * stride_xk
        x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep(seed, offs_m, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        f = tl.load(
            f_cols + offs_k.to(tl.int64)[:, None] * stride_fk, mask=mask_k[:, None] & mask_r[None, :], other=0.0
        )
        acc = dot(x, f, acc, PIECES, INTERPRET)
    return acc


@triton.jit
def outer_tile(
    x_ptr,
    f_ptr,
    seed_ptr,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_fm,
    stride_fr,
    pid_k,
    pid_r,
    m_start,
    m_end,
    threshold,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_R] of drop(x)ᵀ·f over the rows m_start…m_end."""
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < R
    x_cols = x_ptr + offs_k.to(tl.int64)[None, :] * stride_xk
    f_cols = f_ptr + offs_r[None, :] * stride_fr
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for m in tl.range(m_start, m_end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < m_end
        rows = offs_m.to(tl.int64)[:, None]
        x = tl.load(x_cols + rows * stride_xm, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep(seed, offs_m, pid_k * BLOCK_K, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        f = tl.load(f_cols + rows * stride_fm, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = dot(tl.trans(x), f, acc, PIECES, INTERPRET)
    return acc
