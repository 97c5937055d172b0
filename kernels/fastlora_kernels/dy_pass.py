"""dh = scale·dy·b and db = scale·dyᵀ·h, with dy read once from DRAM.

One launch, two roles. Rows come in bands that fit the L2 cache; a band's dh programs (a block of rows × all columns)
and its db programs (a block of columns × all rows of the band) are neighbours in launch order, so the second reading
of the band is an L2 hit. dh needs no partials unless there are few rows; db has one partial a band. Together they stay
under 10 % of dy's bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, arch, on_device
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.reduce import reduce
from fastlora_kernels.shrink import block_r, chunks
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import outer_tile, shrink_tile


@triton.jit(do_not_specialize=["M", "dh_programs", "db_programs", "n_parts"])
def _dy_kernel(
    dy_ptr,
    h_ptr,
    b_ptr,
    dh_ptr,
    db_ptr,
    M,
    N,
    R,
    n_chunk,
    n_parts,
    band_rows,
    dh_programs,
    db_programs,
    stride_dm,
    stride_dn,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    scale,
    H_PIECES: tl.constexpr,
    B_PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    band = tl.program_id(0) // (dh_programs + db_programs)
    pid = tl.program_id(0) % (dh_programs + db_programs)
    pid_r = tl.program_id(1)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    if pid < dh_programs:
        pid_m = band * (band_rows // BLOCK_M) + pid // n_parts
        part = pid % n_parts
        dh = shrink_tile(
            dy_ptr, b_ptr, dy_ptr, M, N, R, stride_dm, stride_dn, stride_bn, stride_br, pid_m, pid_r,
            part * n_chunk, tl.minimum(N, (part + 1) * n_chunk), 0,
            False, B_PIECES, INTERPRET, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        dh_rows = dh_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R
        dh_mask = (offs_m < M)[:, None] & mask_r[None, :]
        tl.store(dh_rows + offs_r[None, :], dh * tl.cast(scale, tl.float32), mask=dh_mask)
    else:
        pid_n = pid - dh_programs
        db = outer_tile(
            dy_ptr, h_ptr, dy_ptr, N, R, stride_dm, stride_dn, stride_hm, stride_hr, pid_n, pid_r,
            band * band_rows, tl.minimum(M, (band + 1) * band_rows), 0,
            False, H_PIECES, INTERPRET, BLOCK_K, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        db_rows = db_ptr + (band.to(tl.int64) * N + offs_n)[:, None] * R
        db_mask = (offs_n < N)[:, None] & mask_r[None, :]
        db *= tl.cast(scale, tl.float32)
        tl.store(db_rows + offs_r[None, :], cast(db, db_ptr.dtype.element_ty, INTERPRET), mask=db_mask)


def bands(M: int, width: int, R: int, block: int) -> tuple[int, int]:
    """(count, rows) of the row bands of a [M, width] operand; a function of shape only.

    As many as make a band at most 32 MiB of bf16 and 2048 rows, so that it stays in L2, yet leave 40·R rows
    to each: fp32 partials of rank R, one a band, are then at most 4·R / (2·40·R) = 5 % of the operand's bytes.
    """
    wanted = triton.cdiv(M, max(1, min(2048, 2**24 // width)))
    rows = triton.cdiv(M, max(1, min(wanted, M // (40 * R))))
    rows = triton.cdiv(rows, block) * block
    return triton.cdiv(M, rows), rows


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
    (M, N), R = dy.shape, b.shape[1]
    dh_out = dy.new_empty((M, R), dtype=torch.float32) if want_dh else None
    db_out = dy.new_empty((N, R), dtype=b.dtype) if want_db else None
    if M * N * R == 0:
        return dh_out.zero_() if dh_out is not None else None, db_out.zero_() if db_out is not None else None
    t = config or tile("dy", arch(dy), dy.dtype, M, N, R)
    rank = block_r(R)
    grid_r = triton.cdiv(R, rank)
    n_bands, band_rows = bands(M, N, R, t.BLOCK_M)
    row_blocks = band_rows // t.BLOCK_M
    n_parts, n_chunk = chunks(N, n_bands * row_blocks * grid_r, t.BLOCK_K, least=max(512, 40 * R))
    dh = dy.new_empty((n_parts, M, R), dtype=torch.float32) if want_dh and n_parts > 1 else dh_out
    db = dy.new_empty((n_bands, N, R), dtype=torch.float32) if want_db and n_bands > 1 else db_out
    dh_programs = row_blocks * n_parts if want_dh else 0
    db_programs = triton.cdiv(N, t.BLOCK_N) if want_db else 0
    with on_device(dy):
        _dy_kernel[(n_bands * (dh_programs + db_programs), grid_r)](
            dy, h if h is not None else dy, b, dh if dh is not None else dy, db if db is not None else dy,
            M, N, R, n_chunk, n_parts, band_rows, dh_programs, db_programs,
            *dy.stride(), *(h.stride() if h is not None else (0, 0)), *b.stride(), scale,
            H_PIECES=pieces(dy.dtype, (torch.float32,), b.dtype), B_PIECES=pieces(dy.dtype, (b.dtype,), torch.float32),
            INTERPRET=INTERPRET, BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=rank, **t.options,
        )  # fmt: skip
    if dh is not None and dh_out is not None and dh is not dh_out:
        reduce(dh, dh_out)
    if db is not None and db_out is not None and db is not db_out:
        reduce(db, db_out)
    return dh_out, db_out
