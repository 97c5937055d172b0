"""patch, unpatch, register: the LoRA layers of a PEFT model run fastlora's ops, in place.

A patched layer is PEFT's own object under a subclass of its own class: parameters, state-dict keys, merging, adapters
and configs stay PEFT's. Only `forward` is ours, and where it does not apply PEFT's runs.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import groups, ops
from fastlora.dispatch import env, fell_back
from fastlora.peft.gated import gate, ungate
from fastlora.peft.judge import LIBRARY, path_of, why_not
from fastlora.peft.layers import FUSED, PEFT
from fastlora.peft.siblings import join, part

Config = TypeVar("Config", bound=lora.LoraConfig)


@dataclass
class PatchReport:
    """What `patch` did: patched[name] = path, skipped[name] = reason.   str() is a table, layers of one kind a row.

    A skipped layer that is skipped for its state (merged, hooked) is fused again as soon as the state has cleared.
    groups: the names of layers that run together, for the model calls them with one tensor.   ungrouped: why no groups
    could be looked for; None when they were.
    gated[name]: how a gated MLP runs as one op.   ungated[name]: why another MLP runs layer by layer.
    """

    patched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    ungrouped: str | None = None
    gated: dict[str, str] = field(default_factory=dict)
    ungated: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        entries = {**self.patched, **{name: f"PEFT's forward: {reason}" for name, reason in self.skipped.items()}}
        rows = Counter((_kind(name), path) for name, path in entries.items())
        for group in self.groups:
            beside = ", ".join(name.split(".")[-1] for name in group[1:])
            rows[_kind(group[0]), f"one group with {beside}"] += 1
        rows.update((_kind(name), how) for name, how in self.gated.items())
        rows.update((_kind(name), f"MLP, layer by layer: {reason}") for name, reason in self.ungated.items())
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{name:<{width}}  ×{count:<4} {path}" for (name, path), count in rows.items()]
        if self.ungrouped is not None:
            lines.append(
                f"no groups: the model could not be traced ({self.ungrouped}); patch(model, inputs={{…}}) helps"
            )
        return "\n".join([f"fastlora runs {len(self.patched)} of {len(entries)} LoRA layers", *lines])


def _kind(name: str) -> str:
    """The name with every number in it a star."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Every adapter layer of the model by name.   Raises TypeError, ValueError when there can be none or is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module with PEFT LoRA layers")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not any(isinstance(layer, lora.LoraLayer) for layer in layers.values()):
        raise ValueError(f"model: {type(model).__name__} has no LoRA layer of PEFT's; call get_peft_model first")
    return layers


def patch(
    model: nn.Module, *, strict: bool = False, inputs: dict[str, Any] | None = None, gated: bool = True
) -> PatchReport:
    """Let every LoRA layer of a PEFT model that can run fastlora's ops, in place; do it again for layers added later.

    Layers that one forward calls with the same tensor (q, k, v; gate, up) run as a group. They are found by running the
    model once on tensors without storage; inputs: what to call it with, by name, where it takes no input_ids.
    A module that computes down(act(gate(x)) * up(x)), with LoRA in any of the three, runs as one op and saves neither
    the activation nor the product. gated: False leaves every MLP to run layer by layer; module.fastlora_gated = False,
    before or after patch, leaves that one.
    strict: raise RuntimeError, before anything is changed, if any layer would be skipped, and on every later call that
    would have to fall back to PEFT's forward; FASTLORA_STRICT=1 does the same. Without it a log record says why, once
    per reason.   Returns a report that prints as a table.
    Raises TypeError when model is no module, ValueError when it has no PEFT LoRA layer.
    """
    layers, report = _lora_layers(model), PatchReport()
    for name, layer in layers.items():
        reason = why_not(layer)
        if reason is not None:
            report.skipped[name] = reason
    if not env.disable:
        _tell(report.skipped, strict)
    _restore(model, layers)
    plain = {name: layer for name, layer in layers.items() if type(layer) is lora.Linear}
    found, report.ungrouped = groups.siblings(model, plain, ops.GROUP, inputs)
    report.groups = [names for names in found if len(names) > 1]
    for name, layer in layers.items():
        if type(layer) in LIBRARY:
            _swap(layer, name, strict)
        if name not in report.skipped:
            path, why = path_of(layer)
            report.patched[name] = path if path == "fused" else f"{path} ({why})"
    report.gated, report.ungated = gate(model, set(map(id, layers.values())), gated)
    for names in report.groups:
        join(model, names, plain)
    return report


def _tell(skipped: dict[str, str], strict: bool) -> None:
    """Say why layers are skipped: those whose class stays PEFT's have no later call that would; under strict raise."""
    if skipped and (strict or env.strict):
        listed = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        asked = "strict=True" if strict else "FASTLORA_STRICT=1"
        raise RuntimeError(f"patch: {asked}, and these layers would run PEFT's own forward:\n{listed}")
    for name, reason in skipped.items():
        fell_back(name, reason)


def _swap(layer: Any, name: str, strict: bool = False) -> None:
    layer.__class__ = FUSED.get(type(layer), type(layer))
    layer._name, layer._strict = name, strict


def _restore(model: nn.Module, layers: dict[str, Any]) -> None:
    part(model)
    ungate(model)
    for layer in layers.values():
        if type(layer) in PEFT:
            layer.__class__ = PEFT[type(layer)]
            del layer._name, layer._strict


def unpatch(model: nn.Module) -> None:
    """Give every patched layer PEFT's own class back.   Raises as `patch`."""
    _restore(model, _lora_layers(model))


def register(lora_config: Config) -> Config:
    """Let layers that PEFT makes from this config be patched from birth; an adapter's added later need its own.

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
    if type(layer) in FUSED:
        _swap(layer, kwargs.get("target_name", ""))
    return layer
