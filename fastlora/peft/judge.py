"""The one judge of what a layer of PEFT's runs, as it stands at that moment: our ops, or PEFT's own forward."""

from __future__ import annotations

import math
import sys
from itertools import product
from operator import itemgetter
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as transformed
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext
from transformers.pytorch_utils import Conv1D

from fastlora.checks import FLOATS
from fastlora.dispatch import env
from fastlora.modules import own

PLAIN_BASES = (nn.Linear, Conv1D)
PLAIN_TENSORS = (nn.Parameter, Tensor)
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROPOUTS = (nn.Identity, nn.Dropout)
_OUR_KWARGS = {"adapter_names", "alora_offsets"}
_STRIDED, _INF = torch.strided, math.inf
_USUAL_DTYPES = {
    (base, a, b) for base, a, b in product(FLOATS, repeat=3) if base is torch.float64 or torch.float64 not in (a, b)
}
"""Of base_layer, lora_A and lora_B."""


LIBRARY: dict[type, str] = {lora.Linear: "", TorchaoLoraLinear: "torchao"}
"""Of the quantised base of each class that we take, PEFT's and ours; "" if plain."""


def librarys(owner: Any, name: str) -> Any:
    """The function of that name, of a class or a module; None if somebody has put another in its place already.

    A library's function sees the globals of the module that defines it; a stranger's, of whatever name, sees others.
    """
    function, kinds = getattr(owner, name), getattr(owner, "__mro__", ())
    home = next((kind.__module__ for kind in kinds if name in vars(kind)), owner.__name__)
    builtin = type(function) is BuiltinFunctionType
    return function if builtin or getattr(function, "__globals__", None) is vars(sys.modules[home]) else None


PASSED_OVER: list[tuple[Any, str, Any]] = [
    (owner, name, librarys(owner, name))
    for owner, name in (
        *((cls, "forward") for cls in (lora.Linear, TorchaoLoraLinear, *PLAIN_BASES, *_DROPOUTS)),
        *((functional, name) for name in ("linear", "dropout")),
    )
]
"""What PEFT's forward calls and ours does not: the libraries' own, None where it was replaced before this import.

A list, for torch 2.11's compiler takes no module for a dictionary's key.
"""


class Adapter(NamedTuple):
    """One active adapter of one layer, as the functional ops take it."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor
    lora_bias: Tensor | None
    p: float
    training: bool


class Plan(NamedTuple):
    """What a layer's forward will run; weight, [N, K], is None where base_layer must be called for its part."""

    base: Any
    weight: Tensor | None
    adapters: list[Adapter]


def autocast_of(x: Tensor) -> torch.dtype | None:
    """What autocast computes in on x's device; None when it is off, and on the meta device, which has none."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if not x.is_meta and torch.is_autocast_enabled(device) else None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward of its own (accelerate)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _intercepted() -> str | None:
    """Who wants to be called by what a fused layer passes over."""
    for owner, name, function in PASSED_OVER:
        if getattr(owner, name) is not function:
            was = f"{function.__module__}.{function.__qualname__}" if function else "before fastlora was imported"
            return f"{owner.__name__}.{name} was replaced ({was})"
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not DeviceContext:  # which looks at functions that make tensors alone
            return f"a {type(mode).__name__} is active: it would not see the layer's functions"
    return None


def plain_weight(base: Any) -> Tensor | str:
    """The weight, [N, K], of a layer that is no more than x·weightᵀ + bias; or what it is, to follow its name."""
    if type(base) not in PLAIN_BASES:
        return f" is a {type(base).__name__}, not a plain Linear or Conv1D"
    if hooked(base):
        return " has hooks, or a forward of its own"
    weight = own(base, "weight")
    if type(weight) not in PLAIN_TENSORS:
        return f".weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in FLOATS:
        return f".weight is {weight.dtype}, not of a floating dtype that fastlora takes"
    return weight.t() if type(base) is Conv1D else weight


def judge(layer: Any) -> Plan | str:
    """What to run for `layer`, a layer of PEFT's patched or not, as it stands now; or why PEFT's forward must."""
    library = LIBRARY.get(type(layer))
    if library is None:
        return f"PEFT's {type(layer).__name__} is not a layer that fastlora takes"
    if layer.merged_adapters:
        return "merged: the base alone holds the update"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if _has_any_global_hook():
        return "global module hooks are registered"
    if transformed():
        return "torch.func does not see through fused ops"
    if forward_ad._current_level >= 0:
        return "forward-mode AD does not see through fused ops"
    intercepted = _intercepted()
    if intercepted is not None:
        return intercepted
    parts = layer._modules
    base = parts["base_layer"]
    weight: Tensor | None = None
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "base_layer is tensor-parallel (_hf_tp_plan)"
    if not library:  # the fused path reads base_layer's weight instead of calling it
        found = plain_weight(base)
        if isinstance(found, str):
            return f"base_layer{found}"
        weight = found
    adapters, lora_A = [], parts["lora_A"]._modules
    for name in layer.active_adapters:
        if name in lora_A:
            adapter = _plan_adapter(layer, name, lora_A[name], parts["lora_B"]._modules[name])
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
    return Plan(base, weight, adapters)


def _plan_adapter(layer: Any, name: str, lora_A: Any, lora_B: Any) -> Adapter | str:
    if name in layer.lora_variant:
        return f"adapter {name!r} is a variant: {type(layer.lora_variant[name]).__name__}"
    dropout = layer._modules["lora_dropout"]._modules[name]
    if not (type(lora_A) is type(lora_B) is nn.Linear and type(dropout) in _DROPOUTS):
        kinds = ", ".join(type(module).__name__ for module in (lora_A, lora_B, dropout))
        return f"adapter {name!r} is made of {kinds}, not of two Linear and Dropout or Identity"
    if hooked(lora_A) or hooked(lora_B) or hooked(dropout):
        return f"adapter {name!r} has hooks in it, or a forward of its own"
    if own(lora_A, "bias") is not None:
        return f"lora_A of adapter {name!r} has a bias"
    a, b = own(lora_A, "weight"), own(lora_B, "weight")
    if type(a) not in PLAIN_TENSORS or type(b) not in PLAIN_TENSORS:
        return f"the weights of adapter {name!r} are {type(a).__name__} and {type(b).__name__}, not plain tensors"
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return f"the weights of adapter {name!r} are {a.dtype} and {b.dtype}, not of dtypes that fastlora takes"
    p, scaling = dropout.p if type(dropout) is nn.Dropout else 0.0, layer.scaling[name]
    if p >= 1:
        return f"adapter {name!r} drops everything (p = {p})"
    if type(dropout) is nn.Dropout and dropout.inplace:
        return f"the dropout of adapter {name!r} is in place: it changes x for whoever reads it next"
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        return f"the scaling of adapter {name!r} is a tensor of shape {tuple(scaling.shape)}, not a number"
    if not isinstance(scaling, Tensor) and not abs(scaling) < math.inf:
        return f"the scaling of adapter {name!r} is {scaling}"
    return Adapter(a, b, scaling, own(lora_B, "bias"), p, dropout.training)


def _usual(layer: Any, x: Tensor) -> Plan | None:
    """What `judge_call` says where one adapter meets a plain Linear and nobody watches: 30 µs of cold layers for 45.

    It reads instance dicts, for a module's attribute costs three times as much.
    """
    here = layer.__dict__
    name, parts = here.get("_active_adapter"), here["_modules"]
    if type(name) is list and len(name) == 1:
        (name,) = name
    if type(name) is not str or name not in (lora_A := parts["lora_A"]._modules):
        return None
    base, A = parts["base_layer"], lora_A[name]
    B, dropout = parts["lora_B"]._modules[name], parts["lora_dropout"]._modules[name]
    in_base, in_A, in_B, in_dropout = base.__dict__, A.__dict__, B.__dict__, dropout.__dict__
    if (
        LIBRARY.get(type(layer)) != ""
        or not type(base) is type(A) is type(B) is nn.Linear
        or type(dropout) not in _DROPOUTS
        or any(_HOOKS(in_base))
        or any(_HOOKS(in_A))
        or any(_HOOKS(in_B))
        or any(_HOOKS(in_dropout))
        or "forward" in in_base
        or "forward" in in_A
        or "forward" in in_B
        or "forward" in in_dropout
        or "forward" in here
        or "_hf_tp_plan" in in_base
        or here["merged_adapters"]
        or here["lora_variant"]
        or not here["cast_input_dtype_enabled"]
        or _has_any_global_hook()
        or transformed()
        or forward_ad._current_level >= 0
        or _intercepted()
    ):
        return None
    of_A, of_B, scaling = in_A["_parameters"], in_B["_parameters"], here["scaling"][name]
    weight, a, b = in_base["_parameters"].get("weight"), of_A.get("weight"), of_B.get("weight")
    p = in_dropout["p"] if type(dropout) is nn.Dropout else 0.0
    if (
        type(x) in PLAIN_TENSORS
        and type(weight) in PLAIN_TENSORS
        and type(a) in PLAIN_TENSORS
        and type(b) in PLAIN_TENSORS
        and weight.dtype is x.dtype
        and (weight.dtype, a.dtype, b.dtype) in _USUAL_DTYPES
        and x.layout is _STRIDED
        and not x.is_nested
        and "bias" in of_B
        and of_A.get("bias", of_A) is None
        and (type(scaling) is float or type(scaling) is int)
        and -_INF < scaling < _INF
        and p < 1
        and not in_dropout.get("inplace")
    ):
        return Plan(base, weight, [Adapter(a, b, scaling, of_B["bias"], p, in_dropout["training"])])
    return None


def judge_call(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | str:
    """`judge` for one call of a layer whose adapters are enabled."""
    if not (args or kwargs or is_compiling()):
        usual = _usual(layer, x)
        if usual is not None:
            return usual
    if kwargs and kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    plan = judge(layer)
    if isinstance(plan, str):
        return plan
    if args or (kwargs and not kwargs.keys() <= _OUR_KWARGS):
        return "further arguments for base_layer"
    if type(x) not in PLAIN_TENSORS:
        return f"x is a {type(x).__name__}, not a plain tensor"
    if x.is_nested or x.layout is not torch.strided:
        return f"x is {'nested' if x.is_nested else x.layout}, not strided"
    weight = plan.weight
    if weight is not None and weight.dtype != x.dtype and autocast_of(x) is None:
        return f"x is {x.dtype} and base_layer.weight {weight.dtype}, with autocast off"
    for adapter in plan.adapters:
        if torch.float64 in (adapter.a.dtype, adapter.b.dtype) and x.dtype != torch.float64:
            return f"an adapter is float64 and x {x.dtype}: PEFT computes the update in float64"
    if not layer.cast_input_dtype_enabled and any(adapter.a.dtype != x.dtype for adapter in plan.adapters):
        return "input casting is disabled, and x and lora_A differ in dtype"
    return plan


def why_not(layer: Any) -> str | None:
    """Why PEFT's own forward runs `layer`, a layer of PEFT's patched or not, as it stands now; None when ours does."""
    if env.disable:
        return "FASTLORA_DISABLE=1"
    plan = judge(layer)
    return plan if isinstance(plan, str) else None


def path_of(layer: Any) -> tuple[str, str]:
    """(path, why) of a patched layer as it stands now.

    path: "fused"; "split", base_layer and then our op; "base", no adapter applies; or "peft", PEFT's own forward.
    """
    if env.disable:
        return "peft", "FASTLORA_DISABLE=1"
    if layer.disable_adapters:
        return "base", "adapters are disabled"
    plan = judge(layer)
    if isinstance(plan, str):
        return "peft", plan
    if not plan.adapters:
        return "base", "no active adapter here"
    if plan.weight is None:
        weight = plan.base.weight
        return "split", f"{LIBRARY[type(layer)]} {getattr(weight, 'quant_type', type(weight).__name__)}"
    if len(plan.adapters) > 1:
        return "split", f"{len(plan.adapters)} active adapters"
    return "fused", "one adapter on a plain base"
