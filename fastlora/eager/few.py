"""One layer on so few elements that a call into torch (1 to 3 µs) costs more than its arithmetic: the fewest calls.

Products with the adapter run in the operands' dtype where all have it and it is no slower, else in fp32. h has that
dtype, and is not yet divided by 1−p: every product of it brings that along in its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.eager.base import as_rows, native, project, pull_back
from fastlora.eager.dropout import kept, lanes
from fastlora.eager.thin import add_product_, cast, dear, wide_dtype
from fastlora.reference import dropout_scale

FEW_INPUTS = 2**17
"""M·K up to which calls cost more than arithmetic."""

WIDE_THIN_PRODUCTS = 2**15
"""M·N·R from which the factors repay their copies to fp32 on a CPU without a matmul of their 16 bits."""


def applies(like: Tensor, size: int) -> bool:
    """Whether a layer beside `like`, of M·K = size, is one of these; it is a CPU's calls that are counted."""
    return size <= FEW_INPUTS and like.is_cpu


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """y, h as `eager.lora_linear` has them, of x: [..., K]."""
    y = project(x, w, bias)
    if x.dim() == 2:
        return y, add_update_(y, x, a, b, lora_bias, seed, scale, p)
    rows = as_rows(x)
    if y._is_view():  # with a bias; autograd forbids to change it in place, as relu_ does
        y = torch.ops.aten._unsafe_view.default(y, y.shape)
    return y, add_update_(y.view(len(rows), y.shape[-1]), rows, a, b, lora_bias, seed, scale, p)


def add_update_(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, lora_bias: Tensor | None, seed: Tensor | None, scale: float, p: float
) -> Tensor:
    """y += scale·drop(x)·aᵀ·bᵀ + scale·lora_bias in place, rounded once.   Returns h."""
    grow = 1.0
    if not _alike(x, a, b):
        wide = wide_dtype(x)
        a, b = cast(a, wide), cast(b, wide)
    if seed is None:
        x = cast(x, a.dtype)
    else:
        x, grow = kept(x, lanes(seed, len(x), x.shape[1], p), p, a.dtype), dropout_scale(p)
    h = linear(x, a)
    if lora_bias is not None:
        y.add_(torch.addmm(lora_bias.to(b.dtype), h, b.t(), alpha=grow), alpha=scale)
    else:
        add_product_(y, h, b.t(), scale * grow)
    return h


def backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db as `eager.lora_backward` has them, of dy: [..., N] and x: [..., K]."""
    if dy.dim() != 2:
        rows, x = as_rows(dy), None if x is None else as_rows(x)
        dx, da, db = backward(rows, x, w, a, b, h, seed, scale, p, want_dx, want_da, want_db)
        return None if dx is None else dx.view(*dy.shape[:-1], a.shape[1]), da, db
    dx = da = db = term = None
    d, a_dtype, b_dtype = dy, a.dtype, b.dtype
    if mixed := not _alike(dy, a, b):
        wide = wide_dtype(dy)
        d, a, b = cast(dy, wide), cast(a, wide), cast(b, wide)
    if seed is not None:
        scale *= dropout_scale(p)
    # first, as in plain torch: few roundings, done elsewhere, would differ from its by chance
    d = d * scale if d is dy else d.mul_(scale)
    if want_db and h is not None:
        db = d.t().mm(cast(h, b.dtype))
    if not (want_dx or want_da):
        return dx, da, None if db is None else cast(db, b_dtype)
    dh, x = d.mm(b), x if want_da else None
    if want_dx and seed is None and w is not None:
        dx = add_product_(pull_back((dy, w)), dh, a)
    elif want_dx:
        term = dh.mm(a)
    if seed is not None:
        mask = lanes(seed, len(dy), a.shape[1], p)
        term = None if term is None else kept(term, mask, p, term.dtype)
        x = None if x is None else kept(x, mask, p, dh.dtype)
    if x is not None:
        da = dh.t().mm(cast(x, dh.dtype))
    if term is not None:
        dx = cast(term, dy.dtype) if w is None else pull_back((dy, w), onto=term)
    if mixed:
        da, db = None if da is None else cast(da, a_dtype), None if db is None else cast(db, b_dtype)
    return dx, da, db


def _alike(rows: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether products of rows, x or dy, with the adapter run in the dtype of all three."""
    if not rows.dtype is a.dtype is b.dtype:
        return False
    if rows.dtype.itemsize > 2:
        return True
    (M, width), (R, K) = rows.shape, a.shape
    return not dear(M, max(K, len(b)), R) if native(rows) else M * width * R < WIDE_THIN_PRODUCTS
