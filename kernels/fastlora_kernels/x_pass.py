"""da = dhᵀ·drop(x): one read of x, its dropout mask regenerated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, arch, on_device
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.dropout import keep_scale, threshold
from fastlora_kernels.dy_pass import bands
from fastlora_kernels.reduce import reduce
from fastlora_kernels.shrink import block_r
from fastlora_kernels.tables import Tile, tile
from fastlora_kernels.tiles import outer_tile


@triton.jit(do_not_specialize=["M"])
def _x_kernel(
    x_ptr,
    dh_ptr,
    seed_ptr,
    da_ptr,
    M,
    K,
    R,
    band_rows,
    stride_xm,
    stride_xk,
    stride_hm,
    stride_hr,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_k, pid_r, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    da = outer_tile(
        x_ptr, dh_ptr, seed_ptr, K, R, stride_xm, stride_xk, stride_hm, stride_hr, pid_k, pid_r,
        band * band_rows, tl.minimum(M, (band + 1) * band_rows), threshold,
        DROPOUT, PIECES, INTERPRET, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    da_cols = da_ptr + (band.to(tl.int64) * R + offs_r)[None, :] * K
    mask = (offs_k < K)[:, None] & (offs_r < R)[None, :]
    da *= tl.cast(scale, tl.float32)
    tl.store(da_cols + offs_k[:, None], cast(da, da_ptr.dtype.element_ty, INTERPRET), mask=mask)


def x_pass(
    x: Tensor,
    dh: Tensor,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """da = dhᵀ · drop(x).

    x: [M, K] bf16/fp16/fp32, any strides.   dh: [M, R] fp32.   dtype: of the result, a's.   p, seed: as in `shrink`.
    Returns da: [R, K].
    """
    (M, K), R = x.shape, dh.shape[1]
    dropped = p > 0 and seed is not None
    out = x.new_empty((R, K), dtype=dtype)
    if M * K * R == 0:
        return out.zero_()
    t = config or tile("x", arch(x), x.dtype, M, K, R)
    rank = block_r(R)
    n_bands, band_rows = bands(M, K, R, t.BLOCK_M)
    da = x.new_empty((n_bands, R, K), dtype=torch.float32) if n_bands > 1 else out
    with on_device(x):
        _x_kernel[(triton.cdiv(K, t.BLOCK_K), triton.cdiv(R, rank), n_bands)](
            x, dh, seed if dropped else x, da, M, K, R, band_rows, *x.stride(), *dh.stride(),
            keep_scale(p) if dropped else 1.0, threshold(p),
            DROPOUT=dropped, PIECES=pieces(x.dtype, (torch.float32,), dtype), INTERPRET=INTERPRET,
            BLOCK_M=t.BLOCK_M, BLOCK_R=rank, BLOCK_K=t.BLOCK_K, **t.options,
        )  # fmt: skip
    return out if da is out else reduce(da, out)
