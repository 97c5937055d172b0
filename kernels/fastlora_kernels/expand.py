"""y = x·wᵀ + bias + scale·h·bᵀ in one GEMM, and its transpose dx: the low-rank term is the prologue.

The low-rank product runs first, into the accumulator that the main loop carries on, so no M×N intermediate exists.
The kernel here loads through pointers, and so takes any strides; `persistent` is the same GEMM on tensor descriptors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, arch, on_device
from fastlora_kernels.dot import cast, pieces
from fastlora_kernels.dropout import keep_scale, threshold
from fastlora_kernels.gemm import main_loop
from fastlora_kernels.persistent import persistent, takes_tma
from fastlora_kernels.prologue import low_rank_tile, rank_step, tile_at
from fastlora_kernels.tables import Tile, tile

GEMM, ADD, NONE = 0, 1, 2
"""What the low-rank term lands on: x·wᵀ computed here, an M×N tensor already there, or nothing."""


@triton.jit(do_not_specialize=["M"])
def _expand_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    b_ptr,
    lora_bias_ptr,
    seed_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    stride_lora_bias,
    stride_ym,
    stride_yn,
    scale,
    threshold,
    BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PIECES: tl.constexpr,
    MAIN_PIECES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N

    mask = mask_m[:, None] & mask_n[None, :]
    if BASE == 1:  # asked for first, so that its latency hides behind the prologue
        base = tl.load(
            x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_n.to(tl.int64)[None, :] * stride_xk,
            mask=mask,
            other=0.0,
        )

    acc = low_rank_tile(
        h_ptr, b_ptr, lora_bias_ptr, seed_ptr, M, N, R, stride_hm, stride_hr, stride_bn, stride_br,
        stride_lora_bias, pid_m, pid_n, scale, threshold,
        HAS_LORA_BIAS, DROPOUT, False, PIECES, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if BASE == 0:
        acc = main_loop(
            x_ptr, w_ptr, acc, M, K, stride_xm, stride_xk, stride_wn, stride_wk, offs_m, offs_n, mask_n,
            MAIN_PIECES, EVEN_N, EVEN_K, INTERPRET, BLOCK_K,
        )  # fmt: skip

    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
    if BASE == 1:
        acc += base.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_tile, cast(acc, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


def _launch(
    kernel: str,
    base: int,
    x: Tensor,
    w: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    y: Tensor,
    config: Tile | None,
) -> Tensor:
    """Run either form over y: [M, N], with x either the GEMM's [M, K] or the [M, N] tensor to add to.

    A tile with tma whose operands no descriptor can address gives way to the table's first tile without; a forced
    one keeps its blocks.
    """
    (M, N), R = y.shape, h.shape[1]
    K = w.shape[1] if w is not None else 0
    if y.numel() == 0:
        return y
    dropped = p > 0 and seed is not None
    main = x.dtype if base != NONE else y.dtype
    t = config or tile(kernel, arch(y), main, M, N, R)
    if t.tma and base == GEMM and w is not None:
        if takes_tma(x, w, y):
            return persistent(x, w, bias, h, b, lora_bias, scale, threshold(p), seed if dropped else None, y, t)
        t = config or tile(kernel, arch(y), main, M, N, R, tma=False)
    even_n, even_k = N % t.BLOCK_N == 0, K % t.BLOCK_K == 0
    with on_device(y):
        _expand_kernel[(triton.cdiv(M, t.BLOCK_M) * triton.cdiv(N, t.BLOCK_N),)](
            x, w if w is not None else x, bias if bias is not None else x, h, b,
            lora_bias if lora_bias is not None else x, seed if dropped else x, y,
            M, N, K, R, *x.stride(), *(w.stride() if w is not None else (0, 0)),
            bias.stride(0) if bias is not None else 0, *h.stride(), *b.stride(),
            lora_bias.stride(0) if lora_bias is not None else 0, *y.stride(),
            scale, threshold(p),
            BASE=base, HAS_BIAS=bias is not None, HAS_LORA_BIAS=lora_bias is not None, DROPOUT=dropped,
            PIECES=pieces(main, (torch.float32, b.dtype), y.dtype),
            MAIN_PIECES=pieces(main, (w.dtype if w is not None else main,), y.dtype),
            EVEN_N=even_n, EVEN_K=even_k, INTERPRET=INTERPRET,
            BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=rank_step(R, t), GROUP_M=8,
            **t.options,
        )  # fmt: skip
    return y


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    scale: float,
    lora_bias: Tensor | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scale·h·bᵀ + scale·lora_bias in one GEMM, rounded once  (the *fused* strategy).

    x: [M, K], w: [N, K], bf16/fp16/fp32 of one dtype, any strides.   bias, lora_bias: [N].   h: [M, R] fp32.
    b: [N, R].
    Returns y: [M, N] in x's dtype.
    """
    y = x.new_empty((x.shape[0], w.shape[0]))
    return _launch("expand", GEMM, x, w, bias, h, b, lora_bias, scale, 0.0, None, y, config)


def add_expand(
    y: Tensor,
    h: Tensor,
    b: Tensor,
    scale: float,
    lora_bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """out = y + scale·h·bᵀ + scale·lora_bias, rounded once  (the *split* strategy's expand).

    y: [M, N], any strides.   out: [M, N], any float dtype; y itself makes it in place; None a new tensor like y.
    Returns out.
    """
    out = y.new_empty(y.shape) if out is None else out
    return _launch("add", ADD, y, None, None, h, b, lora_bias, scale, 0.0, None, out, config)


def dx(
    dy: Tensor,
    w: Tensor,
    dh: Tensor,
    a: Tensor,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """dx = dy·w + mask/(1−p) ⊙ (dh·a) in one GEMM, rounded once  (the *fused* strategy).

    dy: [M, N], w: [N, K] of one dtype, any strides (0 too).   dh: [M, R] fp32.   a: [R, K].   p, seed: as in `shrink`.
    Returns dx: [M, K] in dy's dtype.
    """
    grad = dy.new_empty((dy.shape[0], w.shape[1]))
    return _launch("dx", GEMM, dy, w.t(), None, dh, a.t(), None, keep_scale(p), p, seed, grad, config)


def add_dx(
    base: Tensor | None,
    dh: Tensor,
    a: Tensor,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """base + mask/(1−p) ⊙ (dh·a), in place where there is a base  (the *split* strategy's dx).

    base: [M, K] = dy·w, or None for the low-rank term alone in `dtype`.   Returns dx: [M, K].
    """
    if base is None:
        grad = dh.new_empty((dh.shape[0], a.shape[1]), dtype=dtype)
        return _launch("add", NONE, grad, None, None, dh, a.t(), None, keep_scale(p), p, seed, grad, config)
    return _launch("add", ADD, base, None, None, dh, a.t(), None, keep_scale(p), p, seed, base, config)
