"""What every autograd rule shares, and the only place that draws a dropout seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastlora import ops

_PLAIN = (Tensor, torch.nn.Parameter)


def draw_seed(x: Tensor, *shape: int) -> Tensor:
    """Int64 dropout seeds, one unless a shape is given, from torch's generator of x's device, drawn outside the ops:
    checkpointing, manual_seed, torch.compile and CUDA-graph replay then see ordinary random numbers."""
    return torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64, device=x.device)


def opaque(x: Tensor) -> bool:
    """Whether a call must go through torch.ops.fastlora; for plain tensors its Python body is 10 to 25 µs nearer.

    Whoever must see an op gets one: a dispatch mode, a tensor with a dispatch of its own, or autograd when a second
    derivative is asked for.
    """
    return torch.is_grad_enabled() or x.is_meta or is_in_torch_dispatch_mode() or type(x) not in _PLAIN


def traced() -> bool:
    """Whether a compiler or torch.jit.trace writes down what is called: an op is, and not what a rule runs.

    Also without gradients: torch.jit.trace checks a trace by another one without them. Its file needs fastlora.
    """
    return is_compiling() or _is_tracing()


def face(name: str, x: Tensor) -> Any:
    return getattr(torch.ops.fastlora if opaque(x) else ops, name)


def fold(scaling: float | Tensor, b: Tensor, lora_bias: Tensor | None) -> tuple[float, Tensor, Tensor | None]:
    """A scaling held in a tensor (PEFT's compiled hotswap) moves into b in fp32: no sync, no recompile, no rounding."""
    if not isinstance(scaling, Tensor):
        return float(scaling), b, lora_bias
    wide = torch.promote_types(b.dtype, torch.float32)
    return 1.0, b.to(wide) * scaling, None if lora_bias is None else lora_bias.to(wide) * scaling


def dy_dtype(x: Tensor, out: torch.dtype, a: Tensor, b: Tensor) -> torch.dtype:
    """What an update reads its dy in, which comes in the dtype `out`: x's, unless a factor would lose by that.

    Of an fp32 dy fp16 holds nothing below 2⁻²⁵, so that a gradient in fp32 would come out as 0.
    """
    if out is x.dtype or x.dtype is a.dtype is b.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def sum_rows(dy: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """scale·Σ_m dy[m], summed in fp32: the gradient of a bias."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return (ops.as_rows(dy).sum(0, dtype=wide) * scale).to(dtype)


def sums_of_rows(
    dys: Sequence[Tensor | None], needs: Sequence[bool], dtypes: Sequence[torch.dtype], scales: Sequence[float]
) -> list[Tensor | None]:
    """`sum_rows` of each that is needed and there."""
    members = zip(dys, needs, dtypes, scales, strict=True)
    return [sum_rows(dy, dtype, scale) if need and dy is not None else None for dy, need, dtype, scale in members]


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """dw = dyᵀ·x: the base is frozen in LoRA; when someone trains it, its gradient is right too."""
    return torch.mm(ops.as_rows(dy).t(), ops.as_rows(x))


def parted(flat: Sequence[Any], lists: int = 5) -> list[list[Any]]:
    """The lists that lie one after the other in `flat`: ws, biases, as, bs and lora_biases of layers, unless fewer."""
    count = len(flat) // lists
    return [list(flat[start : start + count]) for start in range(0, len(flat), count)]


def standalone(name: str, setup: Any, backward: Any) -> None:
    """Give the op itself the same rule, so that torch.ops.fastlora.* differentiates (and compiles) on its own.

    The op returns what `backward` has the gradient of, and then what is only kept for it.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # what nobody used has no gradient, where zeros would have one
        setup(ctx, inputs, output)

    torch.library.register_autograd(name, lambda ctx, dy, *_: backward(ctx, dy), setup_context=setup_context)


def no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastlora: a second derivative was asked for (create_graph=True), and the fused backward has none; "
        "fastlora.reference.lora_linear can be differentiated any number of times"
    )
