"""da = dhᵀ·drop(x): one read of x for one layer or for all that share it, their dropout masks regenerated."""

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
from fastlora_kernels.dy_pass import bands
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout, layouts
from fastlora_kernels.members import masked, strides
from fastlora_kernels.reduce import reduce_each
from fastlora_kernels.shrink import block_r
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import outer_tile, ranks_at


@triton.jit(do_not_specialize=["M"])
def _x_kernel(
    x_ptr,
    dh_ptrs,
    seeds_ptr,
    bits_ptr,
    da_ptrs,
    M,
    K,
    Rs,
    bits_width,
    band_rows,
    stride_xm,
    stride_xk,
    strides_hm,
    strides_hr,
    scales,
    thresholds,
    SEEDS: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_k, pid_r, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    das = outer_tile(
        x_ptr, dh_ptrs, seeds_ptr, bits_ptr, M, K, Rs, bits_width, stride_xm, stride_xk, strides_hm, strides_hr,
        pid_k, pid_r, band * band_rows, tl.minimum(M, (band + 1) * band_rows), thresholds,
        SEEDS, BITS, PIECES, INTERPRET, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    for i in tl.static_range(len(dh_ptrs)):
        offs_r = ranks_at(pid_r, BLOCK_R[i])
        da_cols = da_ptrs[i] + (band.to(tl.int64) * Rs[i] + offs_r)[None, :] * K
        mask = (offs_k < K)[:, None] & (offs_r < Rs[i])[None, :]
        da = das[i] * tl.cast(scales[i], tl.float32)
        tl.store(da_cols + offs_k[:, None], cast(da, da_ptrs[i].dtype.element_ty, INTERPRET), mask=mask)


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    x: Layout,
    dhs: tuple[Layout | None, ...],
    dtypes: tuple[torch.dtype, ...],
    ps: tuple[float, ...],
    seeded: bool,
    bits_width: int | None,
    config: Tile | None,
) -> tuple[Launch | None, int]:
    """(what is launched, how many bands of rows it sums apart); None where nothing is wanted, or there is no row."""
    (M, K), stride_x, dtype = x
    members = [i for i, dh in enumerate(dhs) if dh is not None]
    factors = [dh for dh in dhs if dh is not None]
    if not factors or M * K == 0:
        return None, 1
    Rs = tuple(shape[1] for shape, _, _ in factors)
    drops = masked(ps, seeded)
    t = config or tile("x" if len(factors) == 1 else "group_x", at.arch, dtype, M, K, max(Rs))
    ranks = tuple(block_r(R, len(Rs)) for R in Rs)
    n_bands, band_rows = bands(M, max(Rs), t.BLOCK_M, min(2048, max(1, 2**24 // K)))
    launch = Launch(
        _x_kernel, (cdiv(K, t.BLOCK_K), max(map(cdiv, Rs, ranks)), n_bands),
        (M, K, Rs, bits_width, band_rows, *stride_x, *strides(factors),
         tuple(keep_scale(ps[i]) if drops[i] >= 0 else 1.0 for i in members), tuple(threshold(ps[i]) for i in members)),
        t.options, SEEDS=tuple(drops[i] for i in members), BITS=bits_width is not None,
        PIECES=tuple(pieces(dtype, (torch.float32,), dtypes[i], at.precision) for i in members), INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_R=ranks, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip
    return launch, n_bands


def group_x_pass(
    x: Tensor,
    dhs: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    *,
    ps: Sequence[float],
    seeds: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> list[Tensor | None]:
    """da_i = dh_iᵀ · drop_i(x) of each member from one read of x.

    x: [M, K] bf16/fp16/fp32, any strides.   dhs: [M, R] fp32 each, any strides; None where da_i is not wanted.
    dtypes: of the results, each a's.   ps, seeds: as in `group_shrink`.   bits: from `empty_bits`, as many as seeds,
    where the mask of a member whose da_i is wanted is left for dx; not without seeds.
    Returns da_i: [R, K] each, or None.
    """
    K, factors = x.shape[1], tuple([dh for dh in dhs if dh is not None])
    launch, n_bands = _plan(
        place(x), layout(x), layouts(dhs), tuple(dtypes), tuple(ps), seeds is not None,
        bits.shape[2] if bits is not None else None, config,
    )  # fmt: skip
    das = [
        None if dh is None else x.new_empty((dh.shape[1], K), dtype=dtype)
        for dh, dtype in zip(dhs, dtypes, strict=True)
    ]
    outs = [da for da in das if da is not None]
    if launch is None:
        for da in outs:
            da.zero_()
        return das
    parts = [x.new_empty((n_bands, *da.shape), dtype=torch.float32) for da in outs] if n_bands > 1 else outs
    launch((x, factors, x if seeds is None else seeds, x if bits is None else bits, tuple(parts)))
    if n_bands > 1:
        reduce_each(parts, outs)
    return das


def x_pass(
    x: Tensor,
    dh: Tensor,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """da = dhᵀ · drop(x).

    x: [M, K] bf16/fp16/fp32, any strides.   dh: [M, R] fp32.   dtype: of the result, a's.   p, seed: as in `shrink`.
    bits: as in `group_x_pass`.   Returns da: [R, K].
    """
    (da,) = group_x_pass(x, [dh], [dtype], ps=[p], seeds=seed, bits=bits, config=config)
    assert da is not None
    return da
