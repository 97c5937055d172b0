"""Few rows, each with an adapter of its own, and the frozen matmul in one launch: y is written once and never read.

For decoding: the launch reads w once for up to 16 rows, and its latency hides the adapters'. The base's own sum is then
ours, not the vendor's: rows without an adapter equal the base layer's to the tolerance, not to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.gemm import main_loop
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile, tile


@triton.jit(do_not_specialize=["M"])
def _multi_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    b_ptr,
    slot_ptr,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    biased_ptr,
    y_ptr,
    M,
    N,
    K,
    width,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_part,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The prologue takes row by row: no two of them need have the same adapter, and each is a handful of products."""
    offs_i = tl.arange(0, BLOCK_M)
    offs_m = tl.program_id(0) * BLOCK_M + offs_i
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, tl.minimum(BLOCK_M, M - tl.program_id(0) * BLOCK_M)):
        row = (tl.program_id(0) * BLOCK_M + i).to(tl.int64)
        slot = tl.load(slot_ptr + row)
        if slot >= 0:
            start, rank = tl.load(start_ptr + slot).to(tl.int64), tl.load(rank_ptr + slot)
            columns = tl.where((tl.load(biased_ptr + slot) != 0) & (rank > 0), N, 0)
            term = tl.load(b_ptr + (start + rank) * N + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_R)
                mask_r = offs_r < rank
                h = tl.zeros([BLOCK_R], tl.float32)
                for part in tl.static_range(PARTS):
                    h += tl.load(h_ptr + part * stride_part + row * width + offs_r, mask=mask_r, other=0.0)
                b_rows = b_ptr + (start + offs_r)[:, None] * N + offs_n[None, :]
                b = tl.load(b_rows, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
                term += tl.sum(h[:, None] * b.to(tl.float32), 0)
            acc = tl.where((offs_i == i)[:, None], (term * tl.load(scaling_ptr + slot))[None, :], acc)
    acc = main_loop(
        x_ptr, w_ptr, acc, M, K, stride_xm, stride_xk, stride_wn, stride_wk, offs_m, offs_n, mask_n,
        PIECES, EVEN_N, EVEN_K, False, INTERPRET, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_tile, cast(acc, y_ptr.dtype.element_ty, INTERPRET), mask=(offs_m < M)[:, None] & mask_n[None, :])


@lru_cache(maxsize=REMEMBERED)
def _plan(at: Place, x: Layout, w: Layout, bias: Layout | None, h: Layout, config: Tile | None) -> Launch | None:
    (M, K), stride_x, dtype = x
    N, (parts, _, width) = w[0][0], h[0]
    if M * N == 0:
        return None
    t = config or tile("multi_linear", at.arch, dtype, M, N)
    return Launch(
        _multi_linear_kernel, (cdiv(M, t.BLOCK_M), cdiv(N, t.BLOCK_N), 1),
        (M, N, K, width, *stride_x, *w[1], bias[1][0] if bias is not None else 0, h[1][0]), t.options,
        HAS_BIAS=bias is not None, PARTS=parts, PIECES=pieces(dtype, (w[2],), dtype, at.precision),
        EVEN_N=N % t.BLOCK_N == 0, EVEN_K=K % t.BLOCK_K == 0, INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=t.BLOCK_R,
    )  # fmt: skip


def multi_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b_pool: Tensor,
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    slots: Tensor,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scaling·(h[row]·b[start : start + rank] + lora_bias) for the adapter of each row.

    x: [M, K], w: [N, K] of one dtype, any strides.   bias: [N].   h: [parts, M, width] fp32, this layer's share of what
    `multi_shrink` left.   b_pool: [T, N], contiguous.   start, rank, biased: [G] int32, scaling: [G] fp32, its own.
    slots: [M] int32, −1 for base only.   Returns y: [M, N] in x's dtype.
    """
    launch = _plan(place(x), layout(x), layout(w), None if bias is None else layout(bias), layout(h), config)
    y = x.new_empty((x.shape[0], w.shape[0]))
    if launch is not None:
        launch((x, w, x if bias is None else bias, h, b_pool, slots, start, rank, scaling, biased, y))
    return y
