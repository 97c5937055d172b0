"""The GEMM of expand and dx in its second form: tensor descriptors and a persistent grid, for Hopper and later.

The tensor memory accelerator (TMA) fetches whole tiles of x and w, one thread's instruction each, so that no register
holds an address; past an edge a descriptor reads zeros and writes nothing. One program a processor walks over the tiles
of y in the order of the plain form, and each tile sums in that form's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.device import INTERPRET, Place
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.launch import Launch, Layout
from fastlora_kernels.members import GROUP, strides
from fastlora_kernels.prologue import PlannedTerms, low_rank_tile, rank_step, tile_at
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile


@triton.jit(do_not_specialize=["M"])
def _persistent_kernel(
    x0_desc,
    x1_desc,
    x2_desc,
    w0_desc,
    w1_desc,
    w2_desc,
    y_desc,
    bias_ptr,
    h_ptrs,
    b_ptrs,
    lora_bias_ptr,
    masks_ptr,
    M,
    N,
    Ks,
    Rs,
    bits_width,
    stride_bias,
    strides_hm,
    strides_hr,
    strides_bn,
    strides_br,
    stride_lora_bias,
    scales,
    thresholds,
    HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    W_BY_N: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Descriptors come one by one: Triton's launcher does not unpack them from a tuple."""
    x_descs = (x0_desc, x1_desc, x2_desc)
    w_descs = (w0_desc, w1_desc, w2_desc)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_at(pid, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = low_rank_tile(
            h_ptrs, b_ptrs, lora_bias_ptr, masks_ptr, M, N, Rs, bits_width, strides_hm, strides_hr, strides_bn,
            strides_br, stride_lora_bias, pid_m, pid_n, scales, thresholds,
            HAS_LORA_BIAS, DROPS, BITS, FLATTEN, PIECES, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        for i in tl.static_range(len(Ks)):
            for k in tl.range(0, Ks[i], BLOCK_K, warp_specialize=SPECIALIZE):
                x = x_descs[i].load([row, k])
                if W_BY_N[i]:
                    w = tl.trans(w_descs[i].load([col, k]))
                    if INTERPRET:  # numpy sums a transposed operand in another order than the plain form's
                        w = tl.reshape(tl.reshape(w, [BLOCK_K * BLOCK_N]), [BLOCK_K, BLOCK_N])
                else:
                    w = w_descs[i].load([k, col])
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


def _by_rows(t: Layout) -> bool:
    """Whether TMA takes a tensor as it lies: 16-bit rows, 16 bytes or a multiple apart, that neither overlap nor have
    gaps; that it begins at a multiple of 16 bytes is another's to see.

    A coordinate is an int32. A stride of 0, as `y.sum().backward()` gives dy, is no distance for a descriptor.
    """
    (rows, cols), (apart, inner), dtype = t
    return (
        dtype.itemsize == 2
        and inner == 1
        and apart % 8 == 0
        and cols <= apart
        and all(0 < size < 2**31 for size in (rows, cols, apart))
    )


def _transposed(t: Layout) -> Layout:
    shape, strides_of, dtype = t
    return torch.Size(reversed(shape)), strides_of[::-1], dtype


def takes_tma(xs: Sequence[Layout], ws: Sequence[Layout], y: Layout) -> bool:
    """Whether descriptors can address each x: [M, K], each w: [N, K] (by its rows or by its columns) and y: [M, N]."""
    same = all(t[2] == y[2] for t in (*xs, *ws))
    return same and all(map(_by_rows, (y, *xs))) and all(_by_rows(w) or _by_rows(_transposed(w)) for w in ws)


class Boxes(NamedTuple):
    """What descriptors are made of: the tile, and which w lies by its rows [N, K] rather than by its columns."""

    tile: Tile
    by_n: tuple[bool, ...]

    def of(self, xs: Sequence[Tensor], ws: Sequence[Tensor], y: Tensor) -> tuple[TensorDescriptor | None, ...]:
        """The descriptors of each x, each w and y, as the kernel takes them."""
        t, absent = self.tile, [None] * (GROUP - len(xs))
        x_descs = [TensorDescriptor(x, x.shape, x.stride(), [t.BLOCK_M, t.BLOCK_K]) for x in xs]
        w_descs = []
        for w, n in zip(ws, self.by_n, strict=True):
            shape, strides_of = w.shape, w.stride()
            if n:
                w_descs.append(TensorDescriptor(w, shape, strides_of, [t.BLOCK_N, t.BLOCK_K]))
            else:
                w_descs.append(TensorDescriptor(w, shape[::-1], strides_of[::-1], [t.BLOCK_K, t.BLOCK_N]))
        y_desc = TensorDescriptor(y, y.shape, y.stride(), [t.BLOCK_M, min(t.BLOCK_N, 128)])
        return *x_descs, *absent, *w_descs, *absent, y_desc


def persistent(
    at: Place,
    xs: Sequence[Layout],
    ws: Sequence[Layout],
    bias: Layout | None,
    terms: PlannedTerms,
    y: Layout,
    t: Tile,
) -> tuple[Launch, Boxes]:
    """y = Σ_i x_i·w_iᵀ + bias + the low-rank terms, for operands that `takes_tma`: the launch, and its descriptors.

    xs: [M, K] each, ws: [N, K] or a transposed [K, N] each, y: [M, N], of one 16-bit dtype.   t: the tile, whose
    `specialize` gives loads and products warps of their own, and whose `flatten` lets loads run on from a tile into the
    next.   The launch takes bias, the hs, the bs, lora_bias and the masks' seeds or bits.
    """
    (M, N), _, dtype = y
    by_n = tuple(map(_by_rows, ws))
    tiles, step = cdiv(M, t.BLOCK_M) * cdiv(N, t.BLOCK_N), rank_step(terms.rank, t)
    launch = Launch(
        _persistent_kernel, (min(tiles, t.programs * at.processors), 1, 1),
        (M, N, tuple(shape[1] for shape, _, _ in xs), tuple(shape[1] for shape, _, _ in terms.hs),
         terms.bits_width, bias[1][0] if bias is not None else 0, *strides(terms.hs), *strides(terms.bs),
         terms.lora_bias[1][0] if terms.lora_bias is not None else 0, terms.scales, terms.thresholds),
        t.options, HAS_BIAS=bias is not None, HAS_LORA_BIAS=terms.lora_bias is not None, DROPS=terms.drops,
        BITS=terms.bits_width is not None,
        PIECES=pieces(dtype, terms.factors, dtype, at.precision), W_BY_N=by_n, SPECIALIZE=t.specialize,
        FLATTEN=t.flatten and terms.rank <= step, INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=step, GROUP_M=t.GROUP_M,
    )  # fmt: skip
    return launch, Boxes(t, by_n)
