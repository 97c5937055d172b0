"""h = drop(x)·aᵀ: one read of x, for one layer or for all that share it; split over the features at few rows.

Members without dropout are not stacked into one product either: three accumulators of 16 ranks are what they are, 48
columns, where a stack would be padded to 64; and stacking is a launch that copies every `a`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.dropout import keep_scale, threshold
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout, layouts
from fastlora_kernels.members import masked, strides
from fastlora_kernels.reduce import reduce
from fastlora_kernels.sizes import cdiv, power_of_two
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import ranks_at, shrink_tile


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x_ptr,
    a_ptrs,
    seeds_ptr,
    h_ptr,
    M,
    K,
    Rs,
    width,
    k_chunk,
    stride_xm,
    stride_xk,
    strides_ar,
    strides_ak,
    scales,
    thresholds,
    SEEDS: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_r, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    accs = shrink_tile(
        x_ptr, a_ptrs, seeds_ptr, M, K, Rs, stride_xm, stride_xk, strides_ak, strides_ar, pid_m, pid_r,
        pid_k * k_chunk, tl.minimum(K, (pid_k + 1) * k_chunk), thresholds,
        SEEDS, PIECES, INTERPRET, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h_rows = h_ptr + (pid_k.to(tl.int64) * M + offs_m)[:, None] * width
    for i in tl.static_range(len(a_ptrs)):
        offs_r = ranks_at(pid_r, BLOCK_R[i])
        mask = (offs_m < M)[:, None] & (offs_r < Rs[i])[None, :]
        acc = accs[i] * tl.cast(scales[i], tl.float32)
        tl.store(h_rows + offs_r[None, :], cast(acc, h_ptr.dtype.element_ty, INTERPRET), mask=mask)
        h_rows += Rs[i]


def block_r(R: int, members: int = 1) -> int:
    """The padded rank one program holds: a power of two in 16…128; larger ranks take several blocks.

    members: how many accumulators share a tile of x; from two on each holds up to 64 ranks. With 128 the three take so
    many registers that a tile has 32 rows, and `a`, read once a tile, then comes out of L2 more often than x would.
    """
    return min(max(power_of_two(R), 16), 128 if members == 1 else 64)


def chunks(long: int, programs: int, block: int, least: int) -> tuple[int, int]:
    """(count, size) of the pieces a long axis is cut into so that ~256 programs run; a function of shape only.

    long: the axis.   programs: how many there are without cutting.   block: sizes are multiples of it.
    least: the smallest piece worth a program.   No piece is empty.
    """
    wanted = max(1, min(256 // max(programs, 1), long // least))
    size = cdiv(cdiv(long, wanted), block) * block
    return cdiv(long, size), size


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    x: Layout,
    as_: tuple[Layout | None, ...],
    ps: tuple[float, ...],
    seeded: bool,
    config: Tile | None,
) -> tuple[Launch | None, int, int]:
    """(what is launched, how many parts of h it writes, the columns of h); None where h is empty or zero."""
    (M, K), stride_x, dtype = x
    members = [i for i, a in enumerate(as_) if a is not None]
    factors = [a for a in as_ if a is not None]
    Rs = tuple(shape[0] for shape, _, _ in factors)
    width = sum(Rs)
    if M * K * width == 0:
        return None, 1, width
    drops = masked(ps, seeded)
    t = config or tile("shrink" if len(factors) == 1 else "group_shrink", at.arch, dtype, M, K, max(Rs))
    ranks = tuple(block_r(R, len(Rs)) for R in Rs)
    grid_m, grid_r = cdiv(M, t.BLOCK_M), max(map(cdiv, Rs, ranks))
    parts, k_chunk = chunks(K, grid_m * grid_r, t.BLOCK_K, least=512)
    launch = Launch(
        _shrink_kernel, (grid_m, grid_r, parts),
        (M, K, Rs, width, k_chunk, *stride_x, *strides(factors),
         tuple(keep_scale(ps[i]) if drops[i] >= 0 else 1.0 for i in members), tuple(threshold(ps[i]) for i in members)),
        t.options, SEEDS=tuple(drops[i] for i in members),
        PIECES=tuple(pieces(dtype, (a[2],), torch.float32, at.precision) for a in factors), INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_R=ranks, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip
    return launch, parts, width


def group_shrink(
    x: Tensor,
    as_: Sequence[Tensor | None],
    *,
    ps: Sequence[float],
    seeds: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """h = [drop₀(x)·a₀ᵀ | drop₁(x)·a₁ᵀ | …] from one read of x, each member under a mask of its own.

    x: [M, K] bf16/fp16/fp32, any strides.   as_: [R, K] each, any float dtype, R in 1..512; None has no columns.
    ps: dropout probability in [0, 1) of each member.   seeds: [members] int64, what the Philox masks are keyed by.
    config: a forced tile.   Returns h: [M, ΣR] fp32.
    """
    M = x.shape[0]
    launch, parts, width = _plan(place(x), layout(x), layouts(as_), tuple(ps), seeds is not None, config)
    h = x.new_empty((M, width) if parts == 1 else (parts, M, width), dtype=torch.float32)
    if launch is None:
        return h.zero_()
    launch((x, tuple([a for a in as_ if a is not None]), x if seeds is None else seeds, h))
    return h if parts == 1 else reduce(h, h.new_empty((M, width)))


def shrink(x: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None, config: Tile | None = None) -> Tensor:
    """Low-rank activation, h = drop(x) · aᵀ  (shrink).

    x: [M, K] bf16/fp16/fp32, any strides.   a: [R, K], any float dtype; R in 1..512.
    p, seed: dropout probability in [0, 1) and the [] int64 tensor its Philox mask is keyed by.
    config: a forced tile.   Returns h: [M, R] fp32.   (Hu et al. 2021, §4.1)
    """
    return group_shrink(x, [a], ps=[p], seeds=seed, config=config)
