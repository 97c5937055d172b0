"""The autograd rules of one layer: over a plain base, and over any base's output.

Saved for backward: x (an alias), h (fp32, 4·M·R bytes) and the seed. Never the dropped x, never a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastlora import dispatch, ops
from fastlora.checks import check_dtype, check_linear, check_update
from fastlora.functional.rules import (
    draw_seed,
    dy_dtype,
    face,
    fold,
    no_second_derivative,
    opaque,
    outer,
    standalone,
    sum_rows,
    traced,
)


def _save(ctx: Any, x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, h: Tensor, seed: Tensor | None) -> None:
    """Keep what backward will read: x only for da and dw, w only for dx, h only for db; the seed for db too, where
    few rows left h without its 1/(1−p)."""
    need_x, need_w, need_a, need_b = ctx.needs
    ctx.save_for_backward(x if need_a or need_w else None, w if need_x else None, a, b, h if need_b else None, seed)


def _low_rank_grads(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """(dx, da, db), each None unless needed; dx holds the base's part too when forward saved w.

    saved: ctx.saved_tensors, which checkpointing lets a backward read only once.
    """
    need_x, _, need_a, need_b = ctx.needs
    if not (need_x or need_a or need_b):
        return None, None, None
    inputs = (dy, *saved, ctx.scale, ctx.p, need_x, need_a, need_b, ctx.backend)
    if not opaque(dy):
        return ops.gradients(*inputs)
    grads = iter(torch.ops.fastlora.lora_backward(*inputs))
    return tuple(next(grads) if need else None for need in (need_x, need_a, need_b))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, bias, a, b, lora_bias, seed, ctx.scale, ctx.p, ctx.backend = inputs
    need = ctx.needs_input_grad
    ctx.needs = need[0], need[1], need[3], need[4]
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None else None
    _save(ctx, x, w, a, b, output[1], seed)


def _linear_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """dh = scale·dy·b;  db = scale·dyᵀ·h;  da = dhᵀ·drop(x);  dx = dy·w + mask/(1−p) ⊙ (dh·a)."""
    if dy is None:
        return (None,) * 10
    need = ctx.needs_input_grad
    saved = ctx.saved_tensors
    dx, da, db = _low_rank_grads(ctx, dy, saved)
    dw = dbias = dlora_bias = None
    if need[1]:
        dw = outer(dy, saved[0])
    if need[2]:
        dbias = sum_rows(dy, ctx.bias_dtype)
    if need[5]:
        dlora_bias = sum_rows(dy, ctx.lora_bias_dtype, ctx.scale)
    return dx, dw, dbias, da, db, dlora_bias, None, None, None, None


def _update_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], source: Tensor | None = None
) -> None:
    y, x, a, b, lora_bias, seed, ctx.scale, ctx.p, out, ctx.backend = inputs
    need = ctx.needs_input_grad
    ctx.needs = need[1], False, need[2], need[3]
    ctx.y_dtype, ctx.x_dtype, ctx.dy_dtype = y.dtype, x.dtype, dy_dtype(x, out, a, b)
    ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None else None
    _save(ctx, x if source is None else source, None, a, b, output[1], seed)


def _update_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """As `_linear_backward`, with the base's part of dx left to the base: dy passes through."""
    if dy is None:
        return (None,) * 10
    need = ctx.needs_input_grad
    dx, da, db = _low_rank_grads(ctx, dy.to(ctx.dy_dtype), ctx.saved_tensors)
    dx = None if dx is None else dx.to(ctx.x_dtype)
    base = dy.to(ctx.y_dtype) if need[0] else None
    dlora_bias = sum_rows(dy, ctx.lora_bias_dtype, ctx.scale) if need[4] else None
    return base, dx, da, db, dlora_bias, None, None, None, None, None


class _LoRALinear(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_linear`, without the dispatcher's cost (23 µs a call instead of 58)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = face("lora_linear", inputs[0])(*inputs)
        ctx.set_materialize_grads(False)
        _linear_setup(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_linear_backward)


class _LoRAUpdate(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_update`, without the dispatcher's cost; keeps source in x's place."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, source = inputs
        output = face("lora_update", operands[0])(*operands)
        ctx.set_materialize_grads(False)
        _update_setup(ctx, tuple(operands), output, source)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return *_update_backward(ctx, dy), None


class _FewRows(torch.autograd.Function):
    """The rule of `_LoRALinear` where few rows meet a frozen base on a CPU: what autograd is told of costs time there.

    So it is told of x, a and b alone, and keeps the seed as an attribute.
    """

    @classmethod
    def apply(cls, *inputs: Any) -> Tensor:
        """Function's, past what it does for torch.func and for default arguments (9 µs of a cold call's 30)."""
        return super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc]  # torch's stubs lack it

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, rest: tuple[Any, ...]) -> Tensor:
        w, bias, lora_bias, ctx.seed, ctx.scale, ctx.p = rest
        y, h = ops.few.forward(x, w, bias, a, b, lora_bias, ctx.seed, ctx.scale, ctx.p)
        need_x, need_a, need_b, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_a else None, w if need_x else None, a, b, h if need_b else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, w, a, b, h = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        inputs: tuple[Any, ...] = (dy, x, w, a, b, h, ctx.seed, ctx.scale, ctx.p, *needs, "torch")
        if opaque(dy):
            grads = iter(torch.ops.fastlora.lora_backward(*inputs))
            return *(next(grads) if need else None for need in needs), None
        if torch.is_autocast_enabled("cpu"):
            return *ops.gradients(*inputs), None
        return *ops.few.backward(*inputs[:-1]), None


standalone("fastlora::lora_linear", _linear_setup, _linear_backward)
standalone("fastlora::lora_update", _update_setup, _update_backward)
torch.library.register_autograd("fastlora::lora_backward", no_second_derivative)


def _run(name: str, rule: type[torch.autograd.Function], *inputs: Any, own: tuple[Any, ...] = ()) -> Tensor:
    """The op through its cheapest face: traced, inside autograd, or bare.   own: what its rule takes beside inputs."""
    if traced():
        return getattr(torch.ops.fastlora, name)(*inputs)[0]
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return rule.apply(*inputs, *own)
    return face(name, inputs[0])(*inputs)[0]


def lora_linear_on_torch(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, lora_bias: Tensor | None, scale: float, p: float
) -> Tensor:
    """`lora_linear` on the torch backend, without autocast.

    Nothing is checked: what does not fit together is torch's to refuse, as it is in PEFT's own layers.
    """
    seed = draw_seed(x) if p > 0 else None
    if (
        not ops.few.applies(x, x.numel())
        or traced()
        or is_in_torch_dispatch_mode()
        or w.requires_grad
        or (bias is not None and bias.requires_grad)
        or (lora_bias is not None and lora_bias.requires_grad)
    ):
        return _run("lora_linear", _LoRALinear, x, w, bias, a, b, lora_bias, seed, scale, p, "torch")
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return _FewRows.apply(x, a, b, (w, bias, lora_bias, seed, scale, p))
    return ops.few.forward(x, w, bias, a, b, lora_bias, seed, scale, p)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    lora_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The LoRA linear layer, y = x·weightᵀ + bias + scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias).

    x: [..., K], weight: [N, K], bf16/fp16/fp32 of one dtype (fp64 on the torch backend), any strides; under autocast
    both are cast to its dtype.   bias, lora_bias: [N].   lora_A: [R, K], lora_B: [N, R], any float dtype each; fp32
    adapters on a bf16 base keep fp32 accuracy.   scaling: a finite number, or a 0-d tensor.
    dropout_p: probability in [0, 1), applied to x before lora_A when training; masks differ between backends.
    backend: "triton", "torch" or None (the kernels on a GPU, torch elsewhere; FASTLORA_BACKEND overrides None).
    Returns y: [..., N] in x's dtype.  Saves x (an alias), h (M·R fp32) and an 8-byte seed for backward.
    Raises ValueError, TypeError naming the argument that does not fit.   (Hu et al. 2021, §4.1)
    """
    autocast = check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, lora_bias)
    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
    p = dropout_p if training else 0.0
    scale, lora_B, lora_bias = fold(scaling, lora_B, lora_bias)
    where = dispatch.backend_for(x, backend, p > 0)
    if where == "torch" and autocast is None:
        return lora_linear_on_torch(x, weight, bias, lora_A, lora_B, lora_bias, scale, p)
    seed = draw_seed(x) if p > 0 else None
    return _run(
        "lora_linear", _LoRALinear,
        x, weight, bias, lora_A, lora_B, lora_bias, seed, scale, p, where,
    )  # fmt: skip


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    lora_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    source: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The low-rank update over any base output, y + scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias).

    y: [..., N], what a base layer of any kind (quantised, too) made of x: [..., K].   dtype: of the result, y's unless
    given.   source: [..., K], the narrower tensor that x is a wider copy of, saved in its place: dx has x's dtype, so
    that several updates' add up in it, and x itself is gone after forward. Like any x that is saved, source must not be
    changed in place before backward; a compiler saves what it chooses.
    The rest, and what is saved and raised, as in `lora_linear`.   Returns a new tensor [..., N].
    """
    autocast = check_update(y, x, lora_A, lora_B, scaling, dropout_p, lora_bias, source)
    if dtype is not None:
        check_dtype("dtype", dtype)
    if autocast is not None:
        x, source = x.to(autocast), source if source is not None and source.dtype is autocast else None
    p = dropout_p if training else 0.0
    seed = draw_seed(x) if p > 0 else None
    scale, lora_B, lora_bias = fold(scaling, lora_B, lora_bias)
    where = dispatch.backend_for(x, backend, p > 0)
    return _run(
        "lora_update", _LoRAUpdate,
        y, x, lora_A, lora_B, lora_bias, seed, scale, p, dtype or y.dtype, where, own=(source,),
    )  # fmt: skip
