"""The autograd rules of LoRA, each written once, and the only place that draws a dropout seed.

Saved for backward: x (an alias), h (fp32, 4·M·R bytes) and the seed. Never the dropped x, never a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastlora import dispatch, ops
from fastlora.checks import check_linear, check_update


def draw_seed(x: Tensor) -> Tensor:
    """A [] int64 dropout seed from torch's generator of x's device, drawn outside the ops: checkpointing, manual_seed,
    torch.compile and CUDA-graph replay then see an ordinary random number."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)


def _opaque(x: Tensor, backend: str) -> bool:
    """Whether a call must go through torch.ops.fastlora; for plain CPU tensors its Python body is 10 µs nearer.

    Whoever must see an op gets one: a dispatch mode, or autograd when a second derivative is asked for.
    """
    return backend != "torch" or not x.is_cpu or torch.is_grad_enabled() or is_in_torch_dispatch_mode()


def _face(name: str, x: Tensor, backend: str) -> Any:
    return getattr(torch.ops.fastlora if _opaque(x, backend) else ops, name)


def _save(ctx: Any, x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, h: Tensor, seed: Tensor | None) -> None:
    """Keep what backward will read: x only for da and dw, w only for dx, h only for db."""
    need_x, need_w, need_a, need_b = ctx.needs
    ctx.save_for_backward(
        x if need_a or need_w else None,
        w if need_x else None,
        a,
        b,
        h if need_b else None,
        seed if need_x or need_a else None,
    )


def _low_rank_grads(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """(dx, da, db), each None unless needed; dx holds the base's part too when forward saved w.

    saved: ctx.saved_tensors, which checkpointing lets a backward read only once.
    """
    need_x, _, need_a, need_b = ctx.needs
    if not (need_x or need_a or need_b):
        return None, None, None
    inputs = (dy, *saved, ctx.scale, ctx.p, need_x, need_a, need_b, ctx.backend)
    if not _opaque(dy, ctx.backend):
        return ops.gradients(*inputs)
    grads = iter(torch.ops.fastlora.lora_backward(*inputs))
    return tuple(next(grads) if need else None for need in (need_x, need_a, need_b))


def _sum_rows(dy: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale·Σ_m dy[m], summed in fp32: the gradient of a bias."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return (dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide) * scale).to(dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, bias, a, b, lora_bias, seed, ctx.scale, ctx.p, ctx.backend = inputs
    need = ctx.needs_input_grad
    ctx.needs = need[0], need[1], need[3], need[4]
    ctx.bias_dtype = bias.dtype if bias is not None else None
    ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None else None
    _save(ctx, x, w, a, b, output[1], seed)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """dh = scale·dy·b;  db = scale·dyᵀ·h;  da = dhᵀ·drop(x);  dx = dy·w + mask/(1−p) ⊙ (dh·a)."""
    need = ctx.needs_input_grad
    saved = ctx.saved_tensors
    dx, da, db = _low_rank_grads(ctx, dy, saved)
    dw = dbias = dlora_bias = None
    if need[1]:  # the base is frozen in LoRA; when someone trains it, its gradient is right too
        x = saved[0]
        dw = torch.mm(dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1]))
    if need[2]:
        dbias = _sum_rows(dy, ctx.bias_dtype)
    if need[5]:
        dlora_bias = _sum_rows(dy, ctx.lora_bias_dtype, ctx.scale)
    return dx, dw, dbias, da, db, dlora_bias, None, None, None, None


def _update_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, x, a, b, lora_bias, seed, ctx.scale, ctx.p, _, ctx.backend = inputs
    need = ctx.needs_input_grad
    ctx.needs = need[1], False, need[2], need[3]
    ctx.y_dtype, ctx.x_dtype = y.dtype, x.dtype
    ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None else None
    _save(ctx, x, None, a, b, output[1], seed)


def _update_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """As `_linear_backward`, with the base's part of dx left to the base: dy passes through."""
    need = ctx.needs_input_grad
    dx, da, db = _low_rank_grads(ctx, dy.to(ctx.x_dtype), ctx.saved_tensors)
    base = dy.to(ctx.y_dtype) if need[0] else None
    dlora_bias = _sum_rows(dy, ctx.lora_bias_dtype, ctx.scale) if need[4] else None
    return base, dx, da, db, dlora_bias, None, None, None, None, None


class _LoRALinear(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_linear`, without the dispatcher's cost (23 µs a call instead of 58)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _face("lora_linear", inputs[0], inputs[-1])(*inputs)
        _linear_setup(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_linear_backward)


class _LoRAUpdate(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_update`, without the dispatcher's cost."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _face("lora_update", inputs[0], inputs[-1])(*inputs)
        _update_setup(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_update_backward)


def _standalone(name: str, setup: Any, backward: Any) -> None:
    """Give the op itself the same rule, so that torch.ops.fastlora.* differentiates (and compiles) on its own."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        setup(ctx, inputs, output)

    torch.library.register_autograd(name, lambda ctx, dy, _: backward(ctx, dy), setup_context=setup_context)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastlora: a second derivative was asked for (create_graph=True), and the fused backward has none; "
        "fastlora.reference.lora_linear can be differentiated any number of times"
    )


class _Once(torch.autograd.Function):
    """dy as it is, behind a node that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, anchor: Tensor) -> Tensor:
        return dy.view_as(dy)

    backward = staticmethod(_no_second_derivative)


def _once(dy: Tensor) -> Tensor | None:
    """A hook before the backward of `few_rows`: like every other path, it has no second derivative."""
    return _Once.apply(dy, dy.new_zeros((), requires_grad=True)) if torch.is_grad_enabled() else None


_standalone("fastlora::lora_linear", _linear_setup, _linear_backward)
_standalone("fastlora::lora_update", _update_setup, _update_backward)
torch.library.register_autograd("fastlora::lora_backward", _no_second_derivative)


def _run(name: str, rule: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """The op through its cheapest face: traced, inside autograd, or bare."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastlora, name)(*inputs)[0]
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return rule.apply(*inputs)
    return _face(name, inputs[0], inputs[-1])(*inputs)[0]


def _fold(scaling: float | Tensor, b: Tensor, lora_bias: Tensor | None) -> tuple[float, Tensor, Tensor | None]:
    """A scaling held in a tensor (PEFT's compiled hotswap) moves into b in fp32: no sync, no recompile, no rounding."""
    if not isinstance(scaling, Tensor):
        return float(scaling), b, lora_bias
    wide = torch.promote_types(b.dtype, torch.float32)
    return 1.0, b.to(wide) * scaling, None if lora_bias is None else lora_bias.to(wide) * scaling


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
    seed = draw_seed(x) if p > 0 else None
    scale, lora_B, lora_bias = _fold(scaling, lora_B, lora_bias)
    where = dispatch.backend_of(x, backend)
    seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if where == "torch" and seed is None and autocast is None and not seen:
        y = ops.few_rows(x, weight, bias, lora_A, lora_B, lora_bias, scale)
        if y is not None:
            if y.requires_grad:
                y.register_hook(_once)
            return y
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
    backend: str | None = None,
) -> Tensor:
    """The low-rank update over any base output, y + scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias).

    y: [..., N], what a base layer of any kind (quantised, too) made of x: [..., K].   dtype: of the result, y's unless
    given.   The rest, and what is saved and raised, as in `lora_linear`.   Returns a new tensor [..., N].
    """
    autocast = check_update(y, x, lora_A, lora_B, scaling, dropout_p, lora_bias)
    if autocast is not None:
        x = x.to(autocast)
    p = dropout_p if training else 0.0
    seed = draw_seed(x) if p > 0 else None
    scale, lora_B, lora_bias = _fold(scaling, lora_B, lora_bias)
    where = dispatch.backend_of(x, backend)
    return _run(
        "lora_update", _LoRAUpdate,
        y, x, lora_A, lora_B, lora_bias, seed, scale, p, dtype or y.dtype, where,
    )  # fmt: skip
