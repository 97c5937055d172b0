"""z = act(g) ⊙ u and h = drop(z)·aᵀ in one pass, and the gradients of both factors in one elementwise launch.

A gated MLP's last layer reads z for its GEMM and for its shrink; the shrink costs no reading here, for z is in
registers as it is written. Backward computes act(g) and its slope again, so that neither act(g) nor z is kept.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast, dot, pieces
from fastlora_kernels.dropout import keep, keep_scale, threshold
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layout
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


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    g: Layout,
    u: Layout,
    a: Layout | None,
    activation: str,
    p: float,
    config: Tile | None,
) -> tuple[Launch | None, int]:
    """(what is launched, how many parts of h it writes).   p: 0 where nothing is masked."""
    (M, K), _, dtype = g
    R = a[0][0] if a is not None else 0
    if M * K == 0:
        return None, 1
    t = config or tile("glu", at.arch, dtype, M, K, R)
    rank, grid_m = block_r(R), cdiv(M, t.BLOCK_M)
    grid_r = max(cdiv(R, rank), 1)
    # with nothing to sum there is no reason to walk
    parts, k_chunk = chunks(K, grid_m * grid_r, t.BLOCK_K, least=512) if R else (cdiv(K, t.BLOCK_K), t.BLOCK_K)
    launch = Launch(
        _glu_kernel, (grid_m, grid_r, parts),
        (M, K, R, k_chunk, *g[1], *u[1], *(a[1] if a is not None else (0, 0)),
         keep_scale(p) if p > 0 else 1.0, threshold(p)),
        t.options, ACTIVATION=activation, SHRINK=R > 0, DROPOUT=p > 0,
        PIECES=pieces(dtype, (a[2],), torch.float32, at.precision) if a is not None else 0, INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_R=rank, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip
    return launch, parts


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
    M, z = g.shape[0], g.new_empty(g.shape)
    masked = seed is not None and a is not None and p > 0
    launch, parts = _plan(
        place(g), layout(g), layout(u), None if a is None else layout(a), activation, p if masked else 0.0, config
    )
    h = None
    if a is not None:
        h = g.new_empty((M, len(a)) if parts == 1 else (parts, M, len(a)), dtype=torch.float32)
    if launch is None:
        return z, None if h is None else h.zero_()
    launch((g, u, g if a is None else a, seed if seed is not None and masked else g, z, z if h is None else h))
    if h is None or a is None or parts == 1:
        return z, h
    return z, reduce(h, h.new_empty((M, len(a))))


@lru_cache(maxsize=REMEMBERED)
def _backward_plan(
    at: Place, g: Layout, u: Layout, dz: Layout, activation: str, want_z: bool, config: Tile | None
) -> Launch | None:
    (M, K), _, dtype = g
    if M * K == 0:
        return None
    t = config or tile("glu_backward", at.arch, dtype, M, K)
    return Launch(
        _glu_backward_kernel, (cdiv(M, t.BLOCK_M), cdiv(K, t.BLOCK_K), 1), (M, K, *g[1], *u[1], *dz[1]),
        t.options, ACTIVATION=activation, WANT_Z=want_z, INTERPRET=INTERPRET, BLOCK_M=t.BLOCK_M, BLOCK_K=t.BLOCK_K,
    )  # fmt: skip


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
    du = g.new_empty(g.shape) if du is None else du
    dg, z = g.new_empty(g.shape), g.new_empty(g.shape) if want_z else None
    launch = _backward_plan(place(g), layout(g), layout(u), layout(dz), activation, want_z, config)
    if launch is not None:
        launch((g, u, dz, dg, du, dg if z is None else z))
    return dg, du, z
