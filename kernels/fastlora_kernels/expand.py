"""y = x·wᵀ + bias + scale·h·bᵀ in one GEMM, and its transpose dx: the low-rank term is the prologue.

The low-rank product runs first, into the accumulator that the main loop carries on, so no M×N intermediate exists. The
dx of a group is the same with several of each: all members' terms, then all members' main loops, into one accumulator.
The kernel here loads through pointers, and so takes any strides; `persistent` is the same GEMM on tensor descriptors.
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
from fastlora_kernels.gemm import main_loop
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, aligned, layout, layouts
from fastlora_kernels.members import masked, strides
from fastlora_kernels.persistent import Boxes, persistent, takes_tma
from fastlora_kernels.prologue import PlannedTerms, Terms, low_rank_tile, rank_step, tile_at
from fastlora_kernels.sizes import cdiv
from fastlora_kernels.tables import Tile, tile

GEMM, ADD, NONE = 0, 1, 2
"""What the low-rank term lands on: x·wᵀ computed here, an M×N tensor already there, or nothing."""


@triton.jit(do_not_specialize=["M"])
def _expand_kernel(
    x_ptrs,
    w_ptrs,
    bias_ptr,
    h_ptrs,
    b_ptrs,
    lora_bias_ptr,
    masks_ptr,
    y_ptr,
    M,
    N,
    Ks,
    Rs,
    bits_width,
    strides_xm,
    strides_xk,
    strides_wn,
    strides_wk,
    stride_bias,
    strides_hm,
    strides_hr,
    strides_bn,
    strides_br,
    stride_lora_bias,
    stride_ym,
    stride_yn,
    scales,
    thresholds,
    BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    PIECES: tl.constexpr,
    MAIN_PIECES: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAR: tl.constexpr,
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
            x_ptrs[0] + offs_m.to(tl.int64)[:, None] * strides_xm[0] + offs_n.to(tl.int64)[None, :] * strides_xk[0],
            mask=mask,
            other=0.0,
        )

    acc = low_rank_tile(
        h_ptrs, b_ptrs, lora_bias_ptr, masks_ptr, M, N, Rs, bits_width, strides_hm, strides_hr, strides_bn, strides_br,
        stride_lora_bias, pid_m, pid_n, scales, thresholds,
        HAS_LORA_BIAS, DROPS, BITS, False, PIECES, INTERPRET, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if BASE == 0:
        for i in tl.static_range(len(x_ptrs)):
            acc = main_loop(
                x_ptrs[i], w_ptrs[i], acc, M, Ks[i], strides_xm[i], strides_xk[i], strides_wn[i], strides_wk[i],
                offs_m, offs_n, mask_n, MAIN_PIECES, EVEN_N, EVEN_K[i], FAR, INTERPRET, BLOCK_K,
            )  # fmt: skip

    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
    if BASE == 1:
        acc += base.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_tile, cast(acc, y_ptr.dtype.element_ty, INTERPRET), mask=mask)


@lru_cache(maxsize=REMEMBERED)
def _plan(
    at: Place,
    kernel: str,
    base: int,
    xs: tuple[Layout, ...],
    ws: tuple[Layout, ...],
    bias: Layout | None,
    terms: PlannedTerms,
    y: Layout,
    tma: bool,
    config: Tile | None,
) -> tuple[Launch, Boxes | None]:
    """Either form over y: [M, N], and what the persistent one's descriptors are made of.

    tma: whether the big operands lie at multiples of 16 bytes. A tile with tma whose operands no descriptor can address
    gives way to the table's first tile without; a forced one keeps its blocks.
    """
    M, N = y[0]
    main = xs[0][2] if base != NONE else y[2]
    t = config or tile(kernel, at.arch, main, M, N, terms.rank, masks=terms.masked)
    if t.tma and base == GEMM:
        if tma and takes_tma(xs, ws, y):
            return persistent(at, xs, ws, bias, terms, y, t)
        t = config or tile(kernel, at.arch, main, M, N, terms.rank, False, terms.masked)
    Ks, lora_bias = tuple(shape[1] for shape, _, _ in ws), terms.lora_bias
    launch = Launch(
        _expand_kernel, (cdiv(M, t.BLOCK_M) * cdiv(N, t.BLOCK_N), 1, 1),
        (M, N, Ks or (0,), tuple(shape[1] for shape, _, _ in terms.hs), terms.bits_width,
         *strides(xs), *strides(ws or xs),
         bias[1][0] if bias is not None else 0, *strides(terms.hs), *strides(terms.bs),
         lora_bias[1][0] if lora_bias is not None else 0, *y[1], terms.scales, terms.thresholds),
        t.options, BASE=base, HAS_BIAS=bias is not None, HAS_LORA_BIAS=lora_bias is not None, DROPS=terms.drops,
        BITS=terms.bits_width is not None,
        PIECES=pieces(main, terms.factors, y[2], at.precision),
        MAIN_PIECES=pieces(main, tuple(dtype for _, _, dtype in ws), y[2], at.precision),
        EVEN_N=N % t.BLOCK_N == 0, EVEN_K=tuple(K % t.BLOCK_K == 0 for K in Ks),
        FAR=any(t.BLOCK_K * stride[1] >= 2**31 for _, stride, _ in (*xs, *ws)), INTERPRET=INTERPRET,
        BLOCK_M=t.BLOCK_M, BLOCK_N=t.BLOCK_N, BLOCK_K=t.BLOCK_K, BLOCK_R=rank_step(terms.rank, t), GROUP_M=t.GROUP_M,
    )  # fmt: skip
    return launch, None


def _run(
    kernel: str,
    base: int,
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    bias: Tensor | None,
    terms: Terms,
    y: Tensor,
    config: Tile | None,
) -> Tensor:
    """y: [M, N] written, with xs either the GEMMs' [M, K] or the one [M, N] tensor to add to."""
    if y.numel() == 0:
        return y
    launch, boxes = _plan(
        place(y), kernel, base, layouts(xs), layouts(ws), None if bias is None else layout(bias), terms.planned(),
        layout(y), base == GEMM and aligned([*xs, *ws, y]), config,
    )  # fmt: skip
    beside = (
        y if bias is None else bias, tuple(terms.hs), tuple(terms.bs),
        y if terms.lora_bias is None else terms.lora_bias, y if terms.masks is None else terms.masks,
    )  # fmt: skip
    if boxes is not None:
        launch(beside, boxes.of(xs, ws, y))
    else:
        launch((tuple(xs), tuple(ws or xs), *beside, y))
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

    x: [M, K], w: [N, K], bf16/fp16/fp32 of one dtype, any strides.   bias, lora_bias: [N].   h: [M, R] fp32, any
    strides.   b: [N, R].
    Returns y: [M, N] in x's dtype.
    """
    y = x.new_empty((x.shape[0], w.shape[0]))
    return _run("expand", GEMM, [x], [w], bias, Terms([h], [b], (float(scale),), lora_bias), y, config)


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
    """out = y + scale·h·bᵀ + scale·lora_bias, rounded once  (the update of a base that is not ours).

    y: [M, N], any strides.   out: [M, N], any float dtype; y itself makes it in place; None a new tensor like y.
    Returns out.
    """
    out = y.new_empty(y.shape) if out is None else out
    return _run("add", ADD, [y], [], None, Terms([h], [b], (float(scale),), lora_bias), out, config)


def low_rank(
    h: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    lora_bias: Tensor | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = scale·h·bᵀ + scale·lora_bias, to which the vendor's GEMM then adds x·wᵀ  (the *split* strategy).

    h: [M, R] fp32.   b: [N, R].   lora_bias: [N].   Returns y: [M, N] in dtype.
    """
    y, terms = h.new_empty((h.shape[0], b.shape[0]), dtype=dtype), Terms([h], [b], (float(scale),), lora_bias)
    return _run("add", NONE, [y], [], None, terms, y, config)


def _dx_terms(
    dhs: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    ps: Sequence[float],
    seeds: Tensor | None,
    bits: Tensor | None,
) -> Terms:
    """mask_i/(1−p_i) ⊙ (dh_i·a_i) of the members that have both, the masked ones first."""
    both = [(i, dh, a.t()) for i, (dh, a) in enumerate(zip(dhs, as_, strict=True)) if dh is not None and a is not None]
    drops = masked(ps, seeds is not None or bits is not None)
    both.sort(key=lambda term: drops[term[0]] < 0)
    return Terms(
        [dh for _, dh, _ in both],
        [b for _, _, b in both],
        tuple([keep_scale(ps[i]) if drops[i] >= 0 else 1.0 for i, _, _ in both]),
        masks=seeds if bits is None else bits,
        drops=tuple([drops[i] for i, _, _ in both]),
        thresholds=tuple([threshold(ps[i]) for i, _, _ in both]),
    )


def group_dx(
    dys: Sequence[Tensor],
    ws: Sequence[Tensor],
    dhs: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    *,
    ps: Sequence[float],
    seeds: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """dx = Σ_i dy_i·w_i + Σ_i mask_i/(1−p_i) ⊙ (dh_i·a_i) in one accumulator, written and rounded once.

    dys: [M, N] each, ws: [N, K] each, of one dtype, any strides (0 too).   dhs: [M, R] fp32 each, any strides, and
    as_: [R, K] each; None in either has no term, and one member must have one.   ps, seeds: as in `group_shrink`.
    bits: the masks, where the x pass left them; they are then not drawn again.   Returns dx: [M, K] in the dys' dtype.
    """
    grad, terms = dys[0].new_empty((dys[0].shape[0], ws[0].shape[1])), _dx_terms(dhs, as_, ps, seeds, bits)
    alone = len(dys) == len(terms.hs) == 1
    return _run("dx" if alone else "group_dx", GEMM, dys, [w.t() for w in ws], None, terms, grad, config)


def dx(
    dy: Tensor,
    w: Tensor,
    dh: Tensor,
    a: Tensor,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """dx = dy·w + mask/(1−p) ⊙ (dh·a) in one GEMM, rounded once  (the *fused* strategy).

    dy: [M, N], w: [N, K] of one dtype, any strides (0 too).   dh: [M, R] fp32.   a: [R, K].   p, seed: as in `shrink`.
    bits: as in `group_dx`.   Returns dx: [M, K] in dy's dtype.
    """
    return group_dx([dy], [w], [dh], [a], ps=[p], seeds=seed, bits=bits, config=config)


def group_low_rank_dx(
    dhs: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    ps: Sequence[float],
    seeds: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """dx = Σ_i mask_i/(1−p_i) ⊙ (dh_i·a_i), to which the vendor's GEMMs add Σ_i dy_i·w_i  (the *split* strategy).

    The operands as in `group_dx`.   Returns dx: [M, K] in dtype.
    """
    terms = _dx_terms(dhs, as_, ps, seeds, bits)
    grad = terms.hs[0].new_empty((terms.hs[0].shape[0], terms.bs[0].shape[0]), dtype=dtype)
    kernel = "add" if len(terms.hs) == 1 else "group_add"
    return _run(kernel, NONE, [grad], [], None, terms, grad, config)


def low_rank_dx(
    dh: Tensor,
    a: Tensor,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """dx = mask/(1−p) ⊙ (dh·a), to which the vendor's GEMM then adds dy·w  (the *split* strategy).

    dh: [M, R] fp32.   a: [R, K].   p, seed: as in `shrink`.   bits: as in `group_dx`.   Returns dx: [M, K] in dtype.
    """
    return group_low_rank_dx([dh], [a], dtype, ps=[p], seeds=seed, bits=bits, config=config)
