"""patch, unpatch, register: the LoRA layers of a PEFT model run fastlora's ops, in place.

A patched layer is PEFT's own object under a subclass of its own class: parameters, state-dict keys, merging, adapters
and configs stay PEFT's. Only `forward` is ours, and where it does not apply PEFT's runs. `why_not` is the one judge of
that, for the report and for every forward alike, on the layer as it stands at that moment.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from fastlora import dispatch, functional
from fastlora.dispatch import Decision, env
from fastlora.modules import own

_PLAIN_BASES = (nn.Linear, Conv1D)
_PLAIN_TENSORS = (nn.Parameter, Tensor)
_DROPOUTS = (nn.Identity, nn.Dropout)
_OUR_KWARGS = {"adapter_names", "alora_offsets"}

Config = TypeVar("Config", bound=lora.LoraConfig)


class _Fused(nn.Module):
    """The forward of every patched layer: one fused op on a plain base, or base_layer and then one op an adapter.

    Mixed into a class of PEFT's, ahead of it in the method order, so that super().forward is PEFT's own.
    """

    _name = ""  # where it sits in the model, for messages
    _strict = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, y = base(x) + Σ scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias) over the active adapters.

        x: [..., K].   Returns y: [..., N], rounded once, to the base output's dtype.
        """
        if env.disable or self._disable_adapters:
            return super().forward(x, *args, **kwargs)
        plan = _plan_call(self, x, args, kwargs)
        if isinstance(plan, str):
            if not torch.compiler.is_compiling() or env.strict or self._strict:  # a log record would break the graph
                dispatch.fell_back(self._name or type(self).__name__, plan, self._strict)
            return super().forward(x, *args, **kwargs)
        base, weight, adapters = plan
        if weight is not None and len(adapters) == 1:
            a, b, scaling, lora_bias, p, training = adapters[0]
            bias = own(base, "bias")
            return functional.lora_linear(
                x, weight, bias, a, b, scaling, dropout_p=p, training=training, lora_bias=lora_bias
            )
        y = base(x)
        dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
        if len(adapters) > 1:  # as PEFT does: their gradients to x then add up in fp32 and are rounded once
            x = x.to(torch.promote_types(x.dtype, adapters[0].a.dtype))
        for done, (a, b, scaling, lora_bias, p, training) in enumerate(adapters, 1):
            out = wide if done < len(adapters) else dtype
            y = functional.lora_update(
                y, x, a, b, scaling, dropout_p=p, training=training, lora_bias=lora_bias, dtype=out
            )
        return y

    def decide(self, x: Tensor) -> Decision:
        """Which path forward would take for x, and why."""
        path, why = path_of(self)
        plan = _plan_call(self, x, (), {}) if path in ("fused", "split") else why
        if isinstance(plan, str):
            return Decision("peft", None, None, plan)
        N, R = plan.adapters[0].b.shape[0], max(adapter.a.shape[0] for adapter in plan.adapters)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        decision = dispatch.decide(x, N, R, dtype=dtype)
        if path == "fused":
            return decision
        strategy = "split" if decision.strategy else None
        return replace(decision, strategy=strategy, tile=None, why=f"split over {why}; {decision.why}")


class FusedLinear(_Fused, lora.Linear):
    """lora.Linear, fused: over torch.nn.Linear and transformers' Conv1D."""


class FusedTorchaoLoraLinear(_Fused, TorchaoLoraLinear):
    """TorchaoLoraLinear, split: torchao's kernel, then the low-rank term."""


_LIBRARY: dict[type, str] = {}  # of the quantised base of each class that we take, PEFT's and ours; "" if plain
_LIBRARY |= dict.fromkeys((lora.Linear, FusedLinear), "")
_LIBRARY |= dict.fromkeys((TorchaoLoraLinear, FusedTorchaoLoraLinear), "torchao")

if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(_Fused, Linear8bitLt):
        """Linear8bitLt, split: bitsandbytes' kernel, then the low-rank term."""

    _LIBRARY |= dict.fromkeys((Linear8bitLt, FusedLinear8bitLt), "bitsandbytes")

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(_Fused, Linear4bit):
        """Linear4bit, split: bitsandbytes' kernel, then the low-rank term."""

    _LIBRARY |= dict.fromkeys((Linear4bit, FusedLinear4bit), "bitsandbytes")

_FUSED: dict[type, type] = {fused.__bases__[1]: fused for fused in _Fused.__subclasses__()}
_PEFT: dict[type, type] = {fused: original for original, fused in _FUSED.items()}


class _Adapter(NamedTuple):
    """One active adapter of one layer, as the functional ops take it."""

    a: Tensor
    b: Tensor
    scaling: float | Tensor
    lora_bias: Tensor | None
    p: float
    training: bool


class _Plan(NamedTuple):
    """What a layer's forward will run; weight, [N, K], is None where base_layer must be called for its part."""

    base: Any
    weight: Tensor | None
    adapters: list[_Adapter]


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward of its own (accelerate)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plan(layer: Any) -> _Plan | str:
    """What to run for `layer`, a layer of PEFT's patched or not, as it stands now; or why PEFT's forward must."""
    library = _LIBRARY.get(type(layer))
    if library is None:
        return f"PEFT's {type(layer).__name__} is not a layer that fastlora takes"
    if layer.merged_adapters:
        return "merged: the base alone holds the update"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    if _has_any_global_hook():
        return "global module hooks are registered"
    parts = layer._modules
    base, weight = parts["base_layer"], None
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "base_layer is tensor-parallel (_hf_tp_plan)"
    if not library:  # the fused path reads base_layer's weight instead of calling it
        if type(base) not in _PLAIN_BASES:
            return f"base_layer is a {type(base).__name__}, not a plain Linear or Conv1D"
        if _hooked(base):
            return "base_layer has hooks, or a forward of its own"
        weight = own(base, "weight")
        if type(weight) not in _PLAIN_TENSORS:
            return f"base_layer.weight is a {type(weight).__name__}, not a plain tensor"
        if type(base) is Conv1D:
            weight = weight.t()
    adapters, lora_A = [], parts["lora_A"]._modules
    for name in layer.active_adapters:
        if name in lora_A:
            adapter = _plan_adapter(layer, name, lora_A[name], parts["lora_B"]._modules[name])
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
    return _Plan(base, weight, adapters)


def _plan_adapter(layer: Any, name: str, lora_A: Any, lora_B: Any) -> _Adapter | str:
    if name in layer.lora_variant:
        return f"adapter {name!r} is a variant: {type(layer.lora_variant[name]).__name__}"
    dropout = layer._modules["lora_dropout"]._modules[name]
    if not (type(lora_A) is type(lora_B) is nn.Linear and type(dropout) in _DROPOUTS):
        kinds = ", ".join(type(module).__name__ for module in (lora_A, lora_B, dropout))
        return f"adapter {name!r} is made of {kinds}, not of two Linear and Dropout or Identity"
    if _hooked(lora_A) or _hooked(lora_B) or _hooked(dropout):
        return f"adapter {name!r} has hooks in it, or a forward of its own"
    a, b = own(lora_A, "weight"), own(lora_B, "weight")
    if type(a) not in _PLAIN_TENSORS or type(b) not in _PLAIN_TENSORS:
        return f"the weights of adapter {name!r} are {type(a).__name__} and {type(b).__name__}, not plain tensors"
    p = dropout.p if type(dropout) is nn.Dropout else 0.0
    if p >= 1:
        return f"adapter {name!r} drops everything (p = {p})"
    return _Adapter(a, b, layer.scaling[name], own(lora_B, "bias"), p, dropout.training)


def _plan_call(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Plan | str:
    """`_plan` for one call of a layer whose adapters are enabled."""
    if kwargs and kwargs.get("adapter_names") is not None:
        return "a mixed batch (adapter_names)"
    plan = _plan(layer)
    if isinstance(plan, str):
        return plan
    if args or (kwargs and not kwargs.keys() <= _OUR_KWARGS):
        return "further arguments for base_layer"
    if type(x) not in _PLAIN_TENSORS:
        return f"x is a {type(x).__name__}, not a plain tensor"
    weight = plan.weight
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype} and base_layer.weight {weight.dtype}, with autocast off"
    if not layer.cast_input_dtype_enabled and any(adapter.a.dtype != x.dtype for adapter in plan.adapters):
        return "input casting is disabled, and x and lora_A differ in dtype"
    return plan


def why_not(layer: Any) -> str | None:
    """Why PEFT's own forward runs `layer`, a layer of PEFT's patched or not, as it stands now; None when ours does."""
    if env.disable:
        return "FASTLORA_DISABLE=1"
    plan = _plan(layer)
    return plan if isinstance(plan, str) else None


def path_of(layer: Any) -> tuple[str, str]:
    """(path, why) of a patched layer as it stands now.

    path: "fused"; "split", base_layer and then our op; "base", no adapter applies; or "peft", PEFT's own forward.
    """
    if env.disable:
        return "peft", "FASTLORA_DISABLE=1"
    if layer.disable_adapters:
        return "base", "adapters are disabled"
    plan = _plan(layer)
    if isinstance(plan, str):
        return "peft", plan
    if not plan.adapters:
        return "base", "no active adapter here"
    if plan.weight is None:
        weight = plan.base.weight
        return "split", f"{_LIBRARY[type(layer)]} {getattr(weight, 'quant_type', type(weight).__name__)}"
    if len(plan.adapters) > 1:
        return "split", f"{len(plan.adapters)} active adapters"
    return "fused", "one adapter on a plain base"


@dataclass
class PatchReport:
    """What `patch` did: patched[name] = path, skipped[name] = reason.   str() is a table, layers of one kind a row.

    A skipped layer that is skipped for its state (merged, hooked) is fused again as soon as the state has cleared.
    """

    patched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        entries = {**self.patched, **{name: f"PEFT's forward: {reason}" for name, reason in self.skipped.items()}}
        rows = Counter((re.sub(r"\.\d+(?=\.|$)", ".*", name), path) for name, path in entries.items())
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{name:<{width}}  ×{count:<4} {path}" for (name, path), count in rows.items()]
        return "\n".join([f"fastlora runs {len(self.patched)} of {len(entries)} LoRA layers", *lines])


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every adapter layer of the model by name.   Raises TypeError, ValueError when there can be none or is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module with PEFT LoRA layers")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not any(isinstance(layer, lora.LoraLayer) for layer in layers.values()):
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer of PEFT's; call get_peft_model first")
    return layers


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Let every LoRA layer of a PEFT model that can run fastlora's ops, in place; do it again for layers added later.

    strict: raise RuntimeError, before anything is changed, if any layer would be skipped, and on every later call that
    would have to fall back to PEFT's forward.   Returns a report that prints as a table.
    Raises TypeError when model is no module, ValueError when it has no PEFT LoRA layer.
    """
    layers, report = _lora_layers(model), PatchReport()
    for name, layer in layers.items():
        reason = why_not(layer)
        if reason is not None:
            report.skipped[name] = reason
    if strict and report.skipped and not env.disable:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in report.skipped.items())
        raise RuntimeError(f"patch: strict=True, and these layers would run PEFT's own forward:\n{listed}")
    for name, layer in layers.items():
        if type(layer) in _LIBRARY:
            _swap(layer, name, strict)
        if name not in report.skipped:
            path, why = path_of(layer)
            report.patched[name] = path if path == "fused" else f"{path} ({why})"
    return report


def _swap(layer: Any, name: str, strict: bool = False) -> None:
    layer.__class__ = _FUSED.get(type(layer), type(layer))
    layer._name, layer._strict = name, strict


def unpatch(model: nn.Module) -> None:
    """Give every patched layer PEFT's own class back.   Raises as `patch`."""
    for layer in _lora_layers(model).values():
        if type(layer) in _PEFT:
            layer.__class__ = _PEFT[type(layer)]
            del layer._name, layer._strict


def register(lora_config: Config) -> Config:
    """Let layers that PEFT makes from this config be patched from birth, whichever adapter is added, whenever.

    Call it before get_peft_model or add_adapter; the registration is not saved with the adapter.
    Returns lora_config itself.   Raises TypeError when it is not a LoraConfig.
    """
    if not isinstance(lora_config, lora.LoraConfig):
        raise TypeError(f"lora_config: got {type(lora_config).__name__}, wanted a peft.LoraConfig")
    lora_config._register_custom_module({nn.Linear: _create, Conv1D: _create})  # type: ignore[dict-item]
    return lora_config


def _create(target: nn.Module, adapter_name: str, config: lora.LoraConfig, **kwargs: Any) -> nn.Module:
    """The layer that PEFT would make of target (quantised, sharded, …) without our registration, patched if we can."""
    ours = config._custom_modules or {}
    config._custom_modules = {base: make for base, make in ours.items() if make is not _create}
    try:
        layer = lora.LoraModel._create_new_module(config, adapter_name, target, **kwargs)
    finally:
        config._custom_modules = ours
    if type(layer) in _FUSED:
        _swap(layer, kwargs.get("target_name", ""))
    return layer
