"""Published formulations of the LoRA layer, written here in plain torch, to time fastlora beside.

They keep what makes each formulation what it is: the order of its products, what it saves, what it adds in place. A
product that a formulation repeats within one pass is computed once here: each is timed at its best.
Unsloth's and LoRAFusion's round the adapters to x's dtype, so where the two dtypes differ they miss the tolerance and
are not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear


class _InPlaceAdd(torch.autograd.Function):
    """Separate matmuls, the update added in place; no dropout, no bias; x·a is computed again in backward.

    (Unsloth's LoRA_W, Axolotl's LoRA_O.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return linear(x, w).addmm_(x @ a.t(), b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b = ctx.saved_tensors
        scale = ctx.scale
        dh = dy @ b
        da = torch.empty_like(a).addmm_(dh.t(), x, alpha=scale, beta=0)
        db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), alpha=scale, beta=0)
        dx = (dy @ w).addmm_(dh, a, alpha=scale)
        return dx, None, da, db, None


class _DroppedSaved(torch.autograd.Function):
    """The dropped input, its mask and the low rank are stored; the low rank is added inside the GEMM.

    The fused GEMM is stood for by one in-place addmm each way.   (LoRAFusion, single adapter.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        mask = None
        dropped = x
        if p > 0:
            dropped, mask = torch.native_dropout(x, p, True)
        h = dropped @ a.t()
        ctx.save_for_backward(dropped, mask, h, w, a, b)
        ctx.scale, ctx.p = scale, p
        return linear(x, w, bias).addmm_(h, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, h, w, a, b = ctx.saved_tensors
        dh = (dy @ b) * ctx.scale
        da = dh.t() @ dropped
        db = torch.empty_like(b).addmm_(dy.t(), h, alpha=ctx.scale, beta=0)
        dx = dy @ w
        if mask is None:
            dx.addmm_(dh, a)
        else:
            dx.add_(torch.ops.aten.native_dropout_backward(dh @ a, mask, 1 / (1 - ctx.p)))
        return dx, None, None, da, db, None, None


def peft_style(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
) -> Callable[[], Tensor]:
    """PEFT's lora.Linear without its modules; what stands in for it on a machine without PEFT."""

    def call() -> Tensor:
        h = linear(dropout(x.to(a.dtype), p), a)
        return (linear(x, w, bias) + linear(h, b) * scale).to(x.dtype)

    return call


def unsloth_style(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
) -> Callable[[], Tensor] | None:
    if p > 0 or bias is not None or a.dtype != x.dtype:
        return None
    return lambda: _InPlaceAdd.apply(x, w, a, b, scale)


def lorafusion_style(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
) -> Callable[[], Tensor] | None:
    if a.dtype != x.dtype:
        return None
    return lambda: _DroppedSaved.apply(x, w, bias, a, b, scale, p)
