"""The whole layer in launches: which kernels run, in which order, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora_kernels.device import arch
from fastlora_kernels.dropout import bits_for
from fastlora_kernels.dy_pass import dy_pass
from fastlora_kernels.expand import add_expand, dx, expand, low_rank, low_rank_dx
from fastlora_kernels.overlap import aside, mark, pays
from fastlora_kernels.shrink import shrink
from fastlora_kernels.tables import Tile, strategy
from fastlora_kernels.x_pass import x_pass


def chosen(kernel: str, x: Tensor, N: int, K: int, R: int, forced: str, masks: int = 0) -> str:
    """ "fused" or "split" for a main GEMM [M, K]·[K, N]: `forced`, or the table's choice when that is "triton"."""
    return strategy(arch(x), x.dtype, x.shape[0], N, K, R, kernel, masks)[0] if forced == "triton" else forced


def base_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x·wᵀ + bias by the vendor's GEMM.   Returns y: [M, N] in x's dtype, whatever the bias's."""
    return linear(x, w, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))


def expand_by(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float,
    how: str,
) -> Tensor:
    """y = x·wᵀ + bias + scale·h·bᵀ + scale·lora_bias, *fused* or *split*.   h: [M, R] fp32, any strides."""
    if chosen("expand", x, w.shape[0], x.shape[1], h.shape[1], how) == "fused":
        return expand(x, w, bias, h, b, scale, lora_bias)
    return expand_split(x, w, bias, h, b, lora_bias, scale)


def expand_split(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    scale: float,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = x·wᵀ + bias + scale·h·bᵀ + scale·lora_bias by the vendor's GEMM and one launch.   config: of the launch.

    The low-rank term comes first, and the GEMM, which is bound by arithmetic, reads it as it adds: an update behind it
    reads y and writes it again, which nothing hides. But what comes first is rounded to x's dtype. Plain torch rounds
    the term so as well, unless the adapter's dtype is the wider one, and never a bias, which may cancel x·wᵀ: there the
    update is added behind, in fp32.
    """
    if bias is None and torch.promote_types(x.dtype, b.dtype) is x.dtype:
        return low_rank(h, b, scale, x.dtype, lora_bias, config=config).addmm_(x, w.t())
    y = base_linear(x, w, bias)
    return add_expand(y, h, b, scale, lora_bias, out=y, config=config)


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    how: str,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias.

    how: "fused", "split", or "triton" (the table decides).   Returns y: [M, N] in x's dtype, h: [M, R] fp32.
    """
    h = shrink(x, a, p=p, seed=seed)
    return expand_by(x, w, bias, h, b, lora_bias, scale, how), h


def lora_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias over any base output y.   Returns [M, N] in dtype, h: [M, R] fp32."""
    h = shrink(x, a, p=p, seed=seed)
    return add_expand(y, h, b, scale, lora_bias, out=y.new_empty(y.shape, dtype=dtype)), h


def dx_by(
    dy: Tensor,
    w: Tensor | None,
    dh: Tensor,
    a: Tensor,
    p: float,
    seed: Tensor | None,
    fused: bool,
    bits: Tensor | None = None,
) -> Tensor:
    """dx = dy·w + mask/(1−p) ⊙ (dh·a), *fused* or *split*; without w the low-rank term alone."""
    if fused and w is not None:
        return dx(dy, w, dh, a, p=p, seed=seed, bits=bits)
    grad = low_rank_dx(dh, a, dy.dtype, p=p, seed=seed, bits=bits)
    return grad if w is None else grad.addmm_(dy, w)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    how: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db of the layer (w given) or of the low-rank update alone (w None), each None unless wanted.

    dy: [M, N].   x: [M, K], read for da alone.   h: [M, R] fp32 as forward left it, read for db alone.
    Returns dx: [M, K] in dy's dtype, da in a's, db in b's.
    """
    dh, db = dy_pass(dy, h, b, scale, want_dh=want_dx or want_da, want_db=want_db)
    grad = da = bits = None
    if dh is None:
        return grad, da, db
    drops = p > 0 and seed is not None
    fused = want_dx and w is not None and chosen("dx", dy, w.shape[1], w.shape[0], a.shape[0], how, drops) == "fused"
    overlaps = fused and want_da and pays(arch(dy))
    if x is not None and want_da and want_dx and not overlaps:
        bits = bits_for(x, [drops], [True])
    if x is not None and bits is not None:
        da = x_pass(x, dh, a.dtype, p=p, seed=seed, bits=bits)
    since = mark(dh, overlaps)
    if want_dx:
        grad = dx_by(dy, w, dh, a, p, seed, fused, bits)
    if x is not None and want_da and da is None:
        with aside(dh, since):
            da = x_pass(x, dh, a.dtype, p=p, seed=seed)
        if since is not None:
            da.record_stream(torch.cuda.current_stream(da.device))  # its memory is the second stream's
    return grad, da, db
