"""h = drop(x)·aᵀ: one read of x, split over the features when there are few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, arch, on_device
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.dropout import keep_scale, threshold
from fastlora_kernels.reduce import reduce
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import shrink_tile


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    h_ptr,
    M,
    K,
    R,
    k_chunk,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_r, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    acc = shrink_tile(
        x_ptr, a_ptr, seed_ptr, M, K, R, stride_xm, stride_xk, stride_ak, stride_ar, pid_m, pid_r,
        pid_k * k_chunk, tl.minimum(K, (pid_k + 1) * k_chunk), threshold,
        DROPOUT, PIECES, INTERPRET, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    h_rows = h_ptr + (pid_k.to(tl.int64) * M + offs_m)[:, None] * R
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    acc *= tl.cast(scale, tl.float32)
    tl.store(h_rows + offs_r[None, :], cast(acc, h_ptr.dtype.element_ty, INTERPRET), mask=mask)


def block_r(R: int) -> int:
    """The padded rank one program holds: a power of two in 16…128; larger ranks take several blocks."""
    return min(max(triton.next_power_of_2(R), 16), 128)


def chunks(long: int, programs: int, block: int, least: int) -> tuple[int, int]:
    """(count, size) of the pieces a long axis is cut into so that ~256 programs run; a function of shape only.

    long: the axis.   programs: how many there are without cutting.   block: sizes are multiples of it.
    least: the smallest piece worth a program.   No piece is empty.
    """
    wanted = max(1, min(256 // max(programs, 1), long // least))
    size = triton.cdiv(triton.cdiv(long, wanted), block) * block
    return triton.cdiv(long, size), size


def shrink(x: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None, config: Tile | None = None) -> Tensor:
    """Low-rank activation, h = drop(x) · aᵀ  (shrink).

    x: [M, K] bf16/fp16/fp32, any strides.   a: [R, K], any float dtype; R in 1..512.
    p, seed: dropout probability in [0, 1) and the [] int64 tensor its Philox mask is keyed by.
    config: a forced tile.   Returns h: [M, R] fp32.   (Hu et al. 2021, §4.1)
    """
    (M, K), R = x.shape, a.shape[0]
    if M * K * R == 0:
        return x.new_empty((M, R), dtype=torch.float32).zero_()
    dropped = p > 0 and seed is not None
    t = config or tile("shrink", arch(x), x.dtype, M, K, R)
    rank = block_r(R)
    grid_m, grid_r = triton.cdiv(M, t.BLOCK_M), triton.cdiv(R, rank)
    parts, k_chunk = chunks(K, grid_m * grid_r, t.BLOCK_K, least=512)
    h = x.new_empty((parts, M, R), dtype=torch.float32)
    with on_device(x):
        _shrink_kernel[(grid_m, grid_r, parts)](
            x, a, seed if dropped else x, h, M, K, R, k_chunk, *x.stride(), *a.stride(),
            keep_scale(p) if dropped else 1.0, threshold(p),
            DROPOUT=dropped, PIECES=pieces(x.dtype, (a.dtype,), torch.float32), INTERPRET=INTERPRET,
            BLOCK_M=t.BLOCK_M, BLOCK_R=rank, BLOCK_K=t.BLOCK_K, **t.options,
        )  # fmt: skip
    return h[0] if parts == 1 else reduce(h, h.new_empty((M, R)))
