"""The implementations of one LoRA layer, each a factory of one face, the same that a plugin has.

    def build(x, w, bias, a, b, scale, p) -> Callable[[], Tensor] | None

x: [M, K], a: [R, K], b: [N, R] are leaves that want gradients, w: [N, K] and bias ([N] or None) are frozen, scale and
p are numbers. What comes back computes y: [M, N] when called, in training mode, differentiable to x, a and b, with a
fresh dropout mask from torch's own generator each time; None says that the implementation does not apply.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fastlora
from benchmarks.baselines import lorafusion_style, peft_style, unsloth_style
from benchmarks.clock import first_line
from benchmarks.records import BadInput

Call = Callable[[], Tensor]
Build = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float, float], Call | None]

FLOOR = "frozen"
"""The layer without its adapter, whose backward is dx alone: what every time is a ratio to."""


def frozen(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    return lambda: linear(x, w, bias)


def peft(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    layer = _peft_model(w, bias, a, b, scale, p)[0]
    return lambda: layer(x)


def peft_compiled(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    return _compiled(peft(x, w, bias, a, b, scale, p))


def peft_style_compiled(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float
) -> Call:
    return _compiled(peft_style(x, w, bias, a, b, scale, p))


def _compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def reference(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    return lambda: fastlora.reference.lora_linear(x, w, bias, a, b, scale, dropout_p=p)


def ours(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    R = a.shape[0]
    layer = fastlora.LoRALinear.from_linear(base_of(w, bias), r=R, lora_alpha=scale * R, lora_dropout=p)
    layer.lora_A.weight, layer.lora_B.weight = _parameters(a, b)
    return lambda: layer(x)


def ours_patched(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Call:
    model = _peft_model(w, bias, a, b, scale, p)
    fastlora.patch(model, strict=True)
    layer = model[0]
    return lambda: layer(x)


def base_of(w: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer over these very tensors."""
    N, K = w.shape
    base = nn.Linear(K, N, bias=False, device="meta")
    base.weight = nn.Parameter(w, requires_grad=False)
    base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return base


def _parameters(*tensors: Tensor) -> list[nn.Parameter]:
    """The very tensors where they are parameters already, so that their gradients can be asked for."""
    return [t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in tensors]


def _peft_model(w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> nn.Sequential:
    """PEFT's own lora.Linear over these tensors, in training mode, as the only layer of a model."""
    from peft import LoraConfig, inject_adapter_in_model  # where there is no peft, nothing here needs it

    R = a.shape[0]
    config = LoraConfig(r=R, lora_alpha=scale * R, lora_dropout=p, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(base_of(w, bias))).train()
    layer = model[0]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = _parameters(a, b)
    return model


def elsewhere(*_: object) -> None:
    """What needs several layers or several adapters: of the suites block and multi."""


HAS_PEFT = importlib.util.find_spec("peft") is not None
_PEFT: dict[str, Build] = {"peft": peft, "peft-compiled": peft_compiled}
_FOR_PEFT: dict[str, Build] = {"peft-style": peft_style, "peft-style-compiled": peft_style_compiled}

IMPLS: dict[str, Build] = {
    FLOOR: frozen,
    **(_PEFT if HAS_PEFT else _FOR_PEFT),
    "reference": reference,
    "unsloth-style": unsloth_style,
    "lorafusion-style": lorafusion_style,
    "shared-shrink": elsewhere,
    "vllm-style": elsewhere,
    "fastlora": ours,
    **({"fastlora-patched": ours_patched} if HAS_PEFT else {}),
}
"""By name; where peft is not installed, its formulation in plain torch stands in for it."""


def chosen(names: Iterable[str], plugins: Iterable[str]) -> dict[str, Build]:
    """The implementations by name, all where none is named, the floor always, and each plugin "module:function".

    Raises BadInput for a name that there is not, and for a plugin that cannot be imported or called.
    """
    known = {**IMPLS, **{name: _plugin(name) for name in plugins}}
    wanted = [*names] or list(known)
    for name in wanted:
        if name not in known:
            raise BadInput(f"--impl: got {name!r}, wanted some of {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys([FLOOR, *wanted, *plugins])}


def _plugin(name: str) -> Build:
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # a module's own code may raise anything
        raise BadInput(
            f"--plugin: got {name!r}, wanted module:function that can be imported ({first_line(error)})"
        ) from error
    if not callable(build):
        raise BadInput(f"--plugin: got {name!r}, which is of type {type(build).__name__}, wanted a function")
    return build
