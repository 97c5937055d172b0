"""dh = scale·dy·b and db = scale·dyᵀ·h of one layer, or of all of a group, with each dy read once from DRAM.

One launch, two roles. Rows come in bands that fit the L2 cache; a band's dh programs (a block of rows × a part of the
columns) and its db programs (a block of columns × all rows of the band) are neighbours in launch order, member by
member, so the second reading of the band is an L2 hit. dh has a partial a part, db one a band; together they stay under
10 % of dy's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layouts
from fastlora_kernels.members import strides
from fastlora_kernels.reduce import reduce, reduce_each
from fastlora_kernels.shrink import block_r, chunks
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import outer_tile, ranks_at, shrink_tile


@triton.jit
def _dh_tile(
    dy_ptr,
    b_ptr,
    dh_ptr,
    M,
    N,
    R,
    width,
    n_chunk,
    stride_dm,
    stride_dn,
    stride_bn,
    stride_br,
    scale,
    pid_m,
    pid_r,
    part,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dh[part, a block of rows, this member's columns] over a chunk of dy's columns."""
    (dh,) = shrink_tile(
        dy_ptr, (b_ptr,), dy_ptr, M, N, (R,), stride_dm, stride_dn, (stride_bn,), (stride_br,), pid_m, pid_r,
        part * n_chunk, tl.minimum(N, (part + 1) * n_chunk), (0,),
        (-1,), (PIECES,), INTERPRET, BLOCK_M, (BLOCK_R,), BLOCK_K,
    )  # fmt: skip
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = ranks_at(pid_r, BLOCK_R)
    dh_rows = dh_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * width
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(dh_rows + offs_r[None, :], dh * tl.cast(scale, tl.float32), mask=mask)


@triton.jit
def _db_tile(
    dy_ptr,
    h_ptr,
    db_ptr,
    M,
    N,
    R,
    band_rows,
    stride_dm,
    stride_dn,
    stride_hm,
    stride_hr,
    scale,
    pid_n,
    pid_r,
    band,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """db[band, a block of dy's columns] over the rows of a band."""
    (db,) = outer_tile(
        dy_ptr, (h_ptr,), dy_ptr, dy_ptr, M, N, (R,), 0, stride_dm, stride_dn, (stride_hm,), (stride_hr,),
        pid_n, pid_r, band * band_rows, tl.minimum(M, (band + 1) * band_rows), (0,),
        (-1,), False, (PIECES,), INTERPRET, BLOCK_K, (BLOCK_R,), BLOCK_N,
    )  # fmt: skip
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = ranks_at(pid_r, BLOCK_R)
    db_rows = db_ptr + (band.to(tl.int64) * N + offs_n)[:, None] * R
    mask = (offs_n < N)[:, None] & (offs_r < R)[None, :]
    db *= tl.cast(scale, tl.float32)
    tl.store(db_rows + offs_r[None, :], cast(db, db_ptr.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit(do_not_specialize=["M", "dh_programs", "n_parts"])
def _dy_kernel(
    dy_ptrs,
    h_ptrs,
    b_ptrs,
    dh_ptr,
    db_ptrs,
    M,
    Ns,
    Rs,
    width,
    n_chunks,
    n_parts,
    band_rows,
    dh_programs,
    strides_dm,
    strides_dn,
    strides_hm,
    strides_hr,
    strides_bn,
    strides_br,
    scales,
    WANT_DH: tl.constexpr,
    WANT_DB: tl.constexpr,
    H_PIECES: tl.constexpr,
    B_PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    programs = 0
    for i in tl.static_range(len(dy_ptrs)):
        if WANT_DH[i]:
            programs += dh_programs
        if WANT_DB[i]:
            programs += tl.cdiv(Ns[i], BLOCK_N)
    band = tl.program_id(0) // programs
    pid = tl.program_id(0) % programs
    pid_r = tl.program_id(1)
    for i in tl.static_range(len(dy_ptrs)):
        ranks_left = pid_r * BLOCK_R[i] < Rs[i]
        if WANT_DH[i]:
            if (pid >= 0) & (pid < dh_programs) & ranks_left:
                _dh_tile(
                    dy_ptrs[i], b_ptrs[i], dh_ptr, M, Ns[i], Rs[i], width, n_chunks[i],
                    strides_dm[i], strides_dn[i], strides_bn[i], strides_br[i], scales[i],
                    band * (band_rows // BLOCK_M) + pid // n_parts, pid_r, pid % n_parts,
                    B_PIECES[i], INTERPRET, BLOCK_M, BLOCK_K, BLOCK_R[i],
                )  # fmt: skip
            pid -= dh_programs
        if WANT_DB[i]:
            if (pid >= 0) & (pid < tl.cdiv(Ns[i], BLOCK_N)) & ranks_left:
                _db_tile(
                    dy_ptrs[i], h_ptrs[i], db_ptrs[i], M, Ns[i], Rs[i], band_rows,
                    strides_dm[i], strides_dn[i], strides_hm[i], strides_hr[i], scales[i],
                    pid, pid_r, band, H_PIECES[i], INTERPRET, BLOCK_N, BLOCK_K, BLOCK_R[i],
                )  # fmt: skip
            pid -= tl.cdiv(Ns[i], BLOCK_N)
        dh_ptr += Rs[i]


def bands(M: int, R: int, block: int, most: int) -> tuple[int, int]:
    """(count, rows) of the bands that M rows are summed in; a function of shape only.

    Of `most` rows, and of 40·R at least: fp32 partials of rank R, one a band, are then at most 4·R / (2·40·R) = 5 % of
    a 16-bit operand's bytes.   block: rows are a multiple of it.
    """
    rows = cdiv(M, max(1, min(cdiv(M, most), M // (40 * R))))
    rows = cdiv(rows, block) * block
    return cdiv(M, rows), rows


def dy_bands(M: int, N: int, R: int, block: int) -> tuple[int, int]:
    """Bands of dy: of 4 MiB in 16 bits, and of 512 rows at least.

    All programs that are resident at once, 396 on an H200, have to be so near each other that what one reads first the
    other finds in L2. Of 2048 rows 67 MB were read as 93 there; a cache of 40 MiB that forgets what was used longest
    ago gives 98, and with these bands and `dh_parts` 67; at N = 14336 1.09 times the bytes for 1.9.
    """
    return bands(M, R, block, max(512, min(2048, 2**21 // N)))


def dh_parts(M: int, Ns: Sequence[int], Rs: Sequence[int], programs: int, block: int) -> int:
    """How many parts the columns are cut into for dh, counted over all members, each of 40 columns a rank at least.

    As many as fill the processors; and where dy is larger than L2, 32 MiB in 16 bits, of 1024 columns, see `dy_bands`.
    programs: how many there are of one part.   block: parts are multiples of it.
    """
    least = 40 * sum(Rs)
    parts, _ = chunks(sum(Ns), programs, block, max(512 * len(Ns), least))
    return parts if M * sum(Ns) <= 2**24 else max(parts, sum(Ns) // max(1024 * len(Ns), least))


class _Plan(NamedTuple):
    """launch: None where there is nothing to sum.   n_parts, n_bands: the pieces of every dh, and of every db."""

    launch: Launch | None
    n_parts: int
    n_bands: int
    width: int


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    dys: tuple[Layout, ...],
    hs: tuple[Layout | None, ...],
    bs: tuple[Layout, ...],
    scales: tuple[float, ...],
    want_dh: tuple[bool, ...],
    want_db: tuple[bool, ...],
    config: Tile | None,
) -> _Plan:
    M, Ns, dtype = dys[0][0][0], tuple(shape[1] for shape, _, _ in dys), dys[0][2]
    Rs = tuple(shape[1] for shape, _, _ in bs)
    width = sum(Rs)
    if M * max(Ns) == 0 or not any((*want_dh, *want_db)):
        return _Plan(None, 1, 1, width)
    members, ranks = len(dys), tuple(map(block_r, Rs))
    t = config or tile("dy" if members == 1 else "group_dy", at.arch, dtype, M, max(Ns), max(Rs))
    grid_r = max(map(cdiv, Rs, ranks))
    n_bands, band_rows = dy_bands(M, max(Ns), max(Rs), t.BLOCK_M)
    row_blocks = band_rows // t.BLOCK_M
    n_parts = dh_parts(M, Ns, Rs, n_bands * row_blocks * grid_r * members, t.BLOCK_K)
    dh_programs = row_blocks * n_parts
    programs = sum(dh_programs * w + cdiv(N, t.BLOCK_N) * v for N, w, v in zip(Ns, want_dh, want_db, strict=True))
    h_of = [h if h is not None else dy for h, dy in zip(hs, dys, strict=True)]
    dtypes = [b[2] for b in bs]
    launch = Launch(
        _dy_kernel, (n_bands * programs, grid_r, 1),
        (M, Ns, Rs, width, tuple(cdiv(cdiv(N, n_parts), t.BLOCK_K) * t.BLOCK_K for N in Ns), n_parts, band_rows,
         dh_programs, *strides(dys), *strides(h_of), *strides(bs), scales),
        t.options, WANT_DH=want_dh, WANT_DB=want_db,
        H_PIECES=tuple(pieces(dtype, (torch.float32,), b, at.precision) for b in dtypes),
        B_PIECES=tuple(pieces(dtype, (b,), torch.float32, at.precision) for b in dtypes),
        INTERPRET=INTERPRET, BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=ranks,
    )  # fmt: skip
    return _Plan(launch, n_parts, n_bands, width)


def group_dy_pass(
    dys: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    bs: Sequence[Tensor],
    scales: Sequence[float],
    *,
    want_dh: Sequence[bool],
    want_db: Sequence[bool],
    config: Tile | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dh_i = scale_i·dy_i·b_i   and   db_i = scale_i·dy_iᵀ·h_i of each member in one launch.

    dys: [M, N] each, bf16/fp16/fp32 of one dtype, any strides (0 too).   hs: [M, R] fp32 each, any strides, needed
    for db_i.   bs: [N, R] each, any float dtype.
    Returns dh: [M, ΣR] fp32, a member's columns after those before it and unwritten where they are not wanted, or None
    where none are; db_i: [N, R] each in b_i's dtype, or None.
    """
    first, M = dys[0], dys[0].shape[0]
    launch, n_parts, n_bands, width = _plan(
        place(first), layouts(dys), layouts(hs), layouts(bs), tuple(map(float, scales)), tuple(want_dh),
        tuple(want_db), config,
    )  # fmt: skip
    dbs = [b.new_empty(b.shape) if wanted else None for b, wanted in zip(bs, want_db, strict=True)]
    outs = [db for db in dbs if db is not None]
    dh_out = first.new_empty((M, width), dtype=torch.float32) if any(want_dh) else None
    if launch is None:
        for out in (*outs, dh_out):
            if out is not None:
                out.zero_()
        return dh_out, dbs
    dh = first.new_empty((n_parts, M, width), dtype=torch.float32) if dh_out is not None and n_parts > 1 else dh_out
    parts = [db.new_empty((n_bands, *db.shape), dtype=torch.float32) for db in outs] if n_bands > 1 else outs
    db_of = iter(parts)
    launch(
        (tuple(dys), tuple([h if h is not None else dy for h, dy in zip(hs, dys, strict=True)]), tuple(bs),
         dh if dh is not None else first,
         tuple([next(db_of) if wanted else dy for dy, wanted in zip(dys, want_db, strict=True)]))
    )  # fmt: skip
    if dh is not None and dh_out is not None and dh is not dh_out:
        reduce(dh, dh_out)
    if outs and n_bands > 1:
        reduce_each(parts, outs)
    return dh_out, dbs


def dy_pass(
    dy: Tensor,
    h: Tensor | None,
    b: Tensor,
    scale: float,
    *,
    want_dh: bool = True,
    want_db: bool = True,
    config: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dh = scale·dy·b   and   db = scale·dyᵀ·h.

    dy: [M, N] bf16/fp16/fp32, any strides (0 too).   h: [M, R] fp32, needed for db.   b: [N, R], any float dtype.
    Returns dh: [M, R] fp32 or None, db: [N, R] in b's dtype or None.
    """
    dh, (db,) = group_dy_pass([dy], [h], [b], [scale], want_dh=[want_dh], want_db=[want_db], config=config)
    return dh, db
