"""The main loop of a GEMM through pointers: acc + x·wᵀ of one tile, any strides."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels.dot import dot


@triton.jit
def main_loop(
    x_ptr,
    w_ptr,
    acc,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    offs_m,
    offs_n,
    mask_n,
    PIECES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAR: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc: [BLOCK_M, BLOCK_N] carried on over all features.

    Rows past M repeat the last one: they are never stored, and x is loaded without a row mask.   FAR: a step's features
    span 2³¹ elements; to allow for that always costs registers, and spills on sm_80.
    """
    x_rows = x_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * stride_xm
    w_cols = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn
    offs_k = tl.arange(0, BLOCK_K)
    steps = offs_k.to(tl.int64) if FAR else offs_k
    x_tile = x_rows + steps[None, :] * stride_xk
    w_tile = w_cols + steps[:, None] * stride_wk
    for k in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile) if EVEN_N else tl.load(w_tile, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_tile, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(x, w, acc, PIECES, INTERPRET)
        x_tile += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_tile += BLOCK_K * tl.cast(stride_wk, tl.int64)
    return acc
