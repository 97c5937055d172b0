"""The GEMM of expand and dx in its second form: tensor descriptors and a persistent grid, for Hopper and later.

The tensor memory accelerator (TMA) fetches whole tiles of x and w, one thread's instruction each, so that no register
holds an address; past an edge a descriptor reads zeros and writes nothing. One program a processor walks over the tiles
of y in the order of the plain form, and each tile sums in that form's order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.device import INTERPRET, on_device, processors
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.prologue import low_rank_tile, rank_step, tile_at
from fastlora_kernels.tables import Tile


@triton.jit(do_not_specialize=["M"])
def _persistent_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    h_ptr,
    b_ptr,
    lora_bias_ptr,
    seed_ptr,
    y_desc,
    M,
    N,
    K,
    R,
    stride_bias,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    stride_lora_bias,
    scale,
    threshold,
    HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    W_BY_N: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = tile_at(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = low_rank_tile(
            h_ptr, b_ptr, lora_bias_ptr, seed_ptr, M, N, R, stride_hm, stride_hr, stride_bn, stride_br,
            stride_lora_bias, pid_m, pid_n, scale, threshold,
            HAS_LORA_BIAS, DROPOUT, BLOCK_N > 128, PIECES, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        for k in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
            x = x_desc.load([row, k])
            if W_BY_N:
                w = tl.trans(w_desc.load([col, k]))
            else:
                w = w_desc.load([k, col])
            acc = dot(x, w, acc, 0, INTERPRET)
        if HAS_BIAS:
            offs_n = col + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        if BLOCK_N > 128:  # y leaves through shared memory: in halves it takes 32 KiB there, not 64, and a stage fits
            left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))
            y_desc.store([row, col], cast(left, y_desc.dtype, INTERPRET))
            y_desc.store([row, col + BLOCK_N // 2], cast(right, y_desc.dtype, INTERPRET))
        else:
            y_desc.store([row, col], cast(acc, y_desc.dtype, INTERPRET))


def _by_rows(t: Tensor) -> bool:
    """Whether TMA takes t as it lies: 16-bit rows, 16 bytes or a multiple apart, that neither overlap nor have gaps.

    A coordinate is an int32. A stride of 0, as `y.sum().backward()` gives dy, is no distance for a descriptor.
    """
    (rows, cols), (apart, inner) = t.shape, t.stride()
    return (
        t.dtype.itemsize == 2
        and inner == 1
        and t.data_ptr() % 16 == 0
        and apart % 8 == 0
        and cols <= apart
        and all(0 < size < 2**31 for size in (rows, cols, apart))
    )


def takes_tma(x: Tensor, w: Tensor, y: Tensor) -> bool:
    """Whether descriptors can address x: [M, K], w: [N, K] (by its rows or by its columns) and y: [M, N]."""
    same = x.dtype == w.dtype == y.dtype
    return same and _by_rows(x) and _by_rows(y) and (_by_rows(w) or _by_rows(w.t()))


def persistent(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float,
    threshold: int,
    seed: Tensor | None,
    y: Tensor,
    t: Tile,
) -> Tensor:
    """y = x·wᵀ + bias + mask ⊙ scale·(h·bᵀ + lora_bias), written into y: [M, N]; for operands that `takes_tma`.

    x: [M, K], w: [N, K] or a transposed [K, N], y: of one 16-bit dtype.   h: [M, R] fp32.   b: [N, R].
    seed: None means no mask.   t: the tile, whose `specialize` gives loads and products warps of their own.
    """
    (M, N), (K, R) = y.shape, (x.shape[1], h.shape[1])
    by_n = _by_rows(w)
    w_rows, w_block = (w, [t.BLOCK_N, t.BLOCK_K]) if by_n else (w.t(), [t.BLOCK_K, t.BLOCK_N])
    tiles = triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N)
    with on_device(y):
        _persistent_kernel[(min(tiles, processors(y)),)](
            TensorDescriptor.from_tensor(x, [t.BLOCK_M, t.BLOCK_K]),
            TensorDescriptor.from_tensor(w_rows, w_block),
            bias if bias is not None else x, h, b,
            lora_bias if lora_bias is not None else x, seed if seed is not None else x,
            TensorDescriptor.from_tensor(y, [t.BLOCK_M, min(t.BLOCK_N, 128)]),
            M, N, K, R, bias.stride(0) if bias is not None else 0, *h.stride(), *b.stride(),
            lora_bias.stride(0) if lora_bias is not None else 0, scale, threshold,
            HAS_BIAS=bias is not None, HAS_LORA_BIAS=lora_bias is not None, DROPOUT=seed is not None,
            PIECES=pieces(x.dtype, (torch.float32, b.dtype), y.dtype), W_BY_N=by_n, SPECIALIZE=t.specialize,
            INTERPRET=INTERPRET, BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=rank_step(R, t),
            GROUP_M=8, **t.options,
        )  # fmt: skip
    return y
