"""PEFT's formulation of every op in plain torch, each operand in its own dtype: the yardstick of the tolerance policy.

Same names and signatures as `fastlora.reference`. Autograd's own steps, written out: the low-rank branch runs in the
adapter's dtype, the base in x's, and the two meet in the wider one before the result is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import reference


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout as torch does it, under the mask that the kernels draw."""
    if p == 0 or seed is None:
        return x
    keep = reference.dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(keep, x * reference.dropout_scale(p), 0)


def shrink(x: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    return linear(drop(x.to(a.dtype), p, seed), a)


def add_expand(
    y: Tensor, h: Tensor, b: Tensor, scale: float, lora_bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    return (y + linear(h.to(b.dtype), b, lora_bias) * scale).to(dtype or y.dtype)


def expand(
    x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float, lora_bias: Tensor | None = None
) -> Tensor:
    return add_expand(linear(x, w, bias), h, b, scale, lora_bias)


def dy_pass(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scaled = dy.to(b.dtype) * scale
    return scaled @ b, scaled.t() @ h.to(b.dtype)


def x_pass(x: Tensor, dh: Tensor, dtype: torch.dtype, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    return dh.to(dtype).t() @ drop(x.to(dtype), p, seed)


def dx(dy: Tensor, w: Tensor | None, dh: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    update = drop(dh.to(a.dtype) @ a, p, seed).to(dy.dtype)
    return update if w is None else dy @ w + update


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    lora_bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The whole layer, differentiable."""
    h = shrink(x, lora_A, p=dropout_p, seed=seed)
    return expand(x, weight, bias, h, lora_B, scaling, lora_bias)
