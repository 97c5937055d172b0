"""z = act(g) ⊙ u and h = drop(z)·aᵀ in one pass, and the gradients of both factors in one elementwise launch.

A gated MLP's last layer reads z for its GEMM and for its shrink; the shrink costs no reading here, for z is in
registers as it is written. Backward computes act(g) and its slope again, so that neither act(g) nor z is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, arch
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.dropout import keep, keep_scale, threshold
from fastlora_kernels.launch import launch
from fastlora_kernels.reduce import reduce
from fastlora_kernels.shrink import block_r, chunks
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile, tile

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@triton.jit
def _logistic(v):
    """σ(v) and σ'(v) = σ(v)·σ(−v), neither with a difference in it: 1 − σ(v) keeps no digit where v is large."""
    e = tl.exp(-tl.abs(v))
    r = 1.0 / (1.0 + e)
    return tl.where(v >= 0.0, r, e * r), e * r * r


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g) in fp32.

    Three of the five are g·gate(g), whose slope is gate + g·gate'; 0.5·(1 + tanh(v)) is σ(2v), and needs no tanh.
    """
    if ACTIVATION == "silu":
        gate, bend = _logistic(g)
    elif ACTIVATION == "gelu":
        gate = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        bend = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        gate, bend = _logistic(1.5957691216057308 * (g + 0.044715 * g * g * g))
        bend *= 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    if ACTIVATION == "relu":
        act = tl.where(g <= 0.0, 0.0, g)  # selected, not multiplied: NaN passes and −inf does not, as in torch
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        slope = 2.0 * tl.where(g <= 0.0, 0.0, g)
        act = 0.25 * slope * slope
    else:
        act = g * gate
        slope = gate + g * bend
    return act, slope


@triton.jit(do_not_specialize=["M"])
def _glu_kernel(
    g_ptr,
    u_ptr,
    a_ptr,
    seed_ptr,
    z_ptr,
    h_ptr,
    M,
    K,
    R,
    k_chunk,
    stride_gm,
    stride_gk,
    stride_um,
    stride_uk,
    stride_ar,
    stride_ak,
    scale,
    threshold,
    ACTIVATION: tl.constexpr,
    SHRINK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m, pid_r, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]
    g_rows = g_ptr + rows * stride_gm
    u_rows = u_ptr + rows * stride_um
    z_rows = z_ptr + rows * K
    a_cols = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in tl.range(pid_k * k_chunk, tl.minimum(K, (pid_k + 1) * k_chunk), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        cols = offs_k.to(tl.int64)[None, :]
        g = tl.load(g_rows + cols * stride_gk, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_rows + cols * stride_uk, mask=mask, other=0.0).to(tl.float32)
        act, _ = _activate(g, ACTIVATION)
        z = cast(act * u, z_ptr.dtype.element_ty, INTERPRET)
        if pid_r == 0:
            tl.store(z_rows + cols, z, mask=mask)
        if SHRINK:
            if DROPOUT:
                z = tl.where(keep(seed, offs_m, k, threshold, BLOCK_M, BLOCK_K), z, 0.0)
            a_tile = a_cols + offs_k.to(tl.int64)[:, None] * stride_ak
            a = tl.load(a_tile, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc = dot(z, a, acc, PIECES, INTERPRET, ROUNDED=True)
    if SHRINK:
        h_rows = h_ptr + (pid_k.to(tl.int64) * M + offs_m)[:, None] * R
        acc *= tl.cast(scale, tl.float32)
        tl.store(h_rows + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def _glu_backward_kernel(
    g_ptr,
    u_ptr,
    dz_ptr,
    dg_ptr,
    du_ptr,
    z_ptr,
    M,
    K,
    stride_gm,
    stride_gk,
    stride_um,
    stride_uk,
    stride_dm,
    stride_dk,
    ACTIVATION: tl.constexpr,
    WANT_Z: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    rows, cols = offs_m.to(tl.int64)[:, None], offs_k.to(tl.int64)[None, :]
    g = tl.load(g_ptr + rows * stride_gm + cols * stride_gk, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows * stride_um + cols * stride_uk, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dz_ptr + rows * stride_dm + cols * stride_dk, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activate(g, ACTIVATION)
    dg = dz * u * slope
    if ACTIVATION == "relu":
        dg = tl.where(slope == 0.0, 0.0, dg)  # an infinity behind a closed gate
    out = rows * K + cols
    tl.store(dg_ptr + out, cast(dg, dg_ptr.dtype.element_ty, INTERPRET), mask=mask)
    tl.store(du_ptr + out, cast(dz * act, du_ptr.dtype.element_ty, INTERPRET), mask=mask)
    if WANT_Z:
        tl.store(z_ptr + out, cast(act * u, z_ptr.dtype.element_ty, INTERPRET), mask=mask)


def glu(
    g: Tensor,
    u: Tensor,
    activation: str,
    a: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """z = act(g) ⊙ u, rounded once, and h = drop(z) · aᵀ of that z, which is read nowhere.

    g, u: [M, K] bf16/fp16/fp32 of one dtype, any strides.   activation: one of ACTIVATIONS.   a: [R, K], any float
    dtype, R in 1..512, or None.   p, seed: dropout of z before a, as in `shrink`.   config: a forced tile.
    Returns z: [M, K], h: [M, R] fp32, or None without a.   (Shazeer 2020)
    """
    (M, K), R = g.shape, a.shape[0] if a is not None else 0
    z = g.new_empty((M, K))
    if M * K == 0:
        return z, None if a is None else g.new_empty((M, R), dtype=torch.float32).zero_()
    dropped = p > 0 and seed is not None and a is not None
    t = config or tile("glu", arch(g), g.dtype, M, K, R)
    rank, grid_m = block_r(R), cdiv(M, t.BLOCK_M)
    grid_r = max(cdiv(R, rank), 1)
    # with nothing to sum there is no reason to walk
    parts, k_chunk = chunks(K, grid_m * grid_r, t.BLOCK_K, least=512) if R else (cdiv(K, t.BLOCK_K), t.BLOCK_K)
    h = g.new_empty((parts, M, R), dtype=torch.float32) if R else None
    launch(
        _glu_kernel, (grid_m, grid_r, parts),
        (g, u, a if a is not None else g, seed if seed is not None and dropped else g, z, h if h is not None else z),
        (M, K, R, k_chunk, *g.stride(), *u.stride(), *(a.stride() if a is not None else (0, 0)),
         keep_scale(p) if dropped else 1.0, threshold(p) if dropped else 0),
        ACTIVATION=activation, SHRINK=R > 0, DROPOUT=dropped,
        PIECES=pieces(g.dtype, (a.dtype,), torch.float32) if a is not None else 0, INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_R=rank, BLOCK_K=t.BLOCK_K, options=t.options,
    )  # fmt: skip
    if h is None or parts == 1:
        return z, None if h is None else h[0]
    return z, reduce(h, h.new_empty((M, R)))


def glu_backward(
    g: Tensor,
    u: Tensor,
    dz: Tensor,
    activation: str,
    *,
    du: Tensor | None = None,
    want_z: bool = False,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg = dz ⊙ u ⊙ act'(g), du = dz ⊙ act(g), and z = act(g) ⊙ u again, each rounded once.

    g, u, dz: [M, K], any strides.   du: where it goes, contiguous; may be dz itself.
    Returns dg, du, z (None unless wanted): [M, K] in g's dtype.
    """
    M, K = g.shape
    du = g.new_empty((M, K)) if du is None else du
    dg, z = g.new_empty((M, K)), g.new_empty((M, K)) if want_z else None
    if M * K == 0:
        return dg, du, z
    t = config or tile("glu_backward", arch(g), g.dtype, M, K)
    launch(
        _glu_backward_kernel, (cdiv(M, t.BLOCK_M), cdiv(K, t.BLOCK_K), 1),
        (g, u, dz, dg, du, z if z is not None else dg), (M, K, *g.stride(), *u.stride(), *dz.stride()),
        ACTIVATION=activation, WANT_Z=want_z, INTERPRET=INTERPRET, BLOCK_M=t.BLOCK_M, BLOCK_K=t.BLOCK_K,
        options=t.options,
    )  # fmt: skip
    return dg, du, z
