"""Putting MultiLoRALinear in the place of a model's linear layers, and everything back as it was."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import groups, ops
from fastlora.adapters import Adapter, Target, matches, read
from fastlora.multi import Group, MultiLoRALinear, Tables

IDS = 2, 3
"""The shape of the ids that a model is traced with: a shape in a layer says what each of its dimensions is."""


@dataclass(frozen=True)
class Place:
    """Where a layer sits in its parent, what was there (a layer of PEFT's may be), and what computes its base."""

    parent: nn.Module
    child: str
    name: str
    layer: nn.Module

    @property
    def base(self) -> nn.Module:
        base: Any = getattr(self.layer, "base_layer", self.layer)
        return base


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, with PEFT's LoRA layers in it if it is a PeftModel.

    Raises TypeError when model is no module, or a PeftModel of another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a Hugging Face model, plain or PEFT")
    for name, config in _configs(model).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise TypeError(
                f"model: got a PeftModel whose adapter {name!r} is {kind}, wanted LORA adapters or none; give its "
                "base model (model.get_base_model()) and load the adapter by load_adapter"
            )
    whole: Any = model
    base: nn.Module = whole.get_base_model() if hasattr(whole, "get_base_model") else model
    return base


def _configs(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def sizes(layer: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a linear layer: torch's, transformers' Conv1D, or a quantised one; None for any other module."""
    kinds = [kind.__name__ for kind in type(layer).__mro__]
    shape: Any
    if "Conv1D" in kinds and isinstance(layer.weight, Tensor):
        shape = tuple(layer.weight.shape)
    elif any("Linear" in kind for kind in kinds):
        shape = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    else:
        return None
    return shape if len(shape) == 2 and all(isinstance(size, int) for size in shape) else None


def find(base: nn.Module, target_modules: Any) -> list[Place]:
    """The layers to serve.   target_modules: name endings, a regex, or None for every linear layer but the head.

    Raises ValueError when there is none, or for no regex, TypeError for a layer of PEFT's that is no LoRA layer over a
    linear one.
    """
    whole: Any = base
    head = whole.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    every = target_modules in (None, "all-linear")
    try:
        matches("" if every else target_modules, "")
    except (re.error, TypeError) as error:
        raise ValueError(f"target_modules: got {target_modules!r}, wanted name endings or a regex: {error}") from error
    places = []
    for place in _walk(base, ""):
        wrapped = place.base is not place.layer
        if wrapped and (sizes(place.base) is None or not hasattr(place.layer, "lora_A")):
            raise TypeError(f"model: got a {type(place.layer).__name__} at {place.name}, wanted LoRA on linear layers")
        inner = place.layer is not head and place.name.split(".")[-1] != "lm_head"
        if wrapped or (inner if every else matches(target_modules, place.name)):
            places.append(place)
    if not places:
        raise ValueError(f"target_modules: got {target_modules!r}, which means no linear layer of the model")
    return places


def _walk(module: nn.Module, prefix: str) -> Iterator[Place]:
    """Every linear layer, and every layer of PEFT's, without what is inside of it."""
    for child, layer in module.named_children():
        name = prefix + child
        if hasattr(layer, "base_layer") or sizes(layer) is not None:
            yield Place(module, child, name, layer)
        else:
            yield from _walk(layer, f"{name}.")


class Seats:
    """The linear layers of a model, and MultiLoRALinear in their places.

    named: each layer's place, under the first of its names where it sits in several.   device: of all of them.
    """

    def __init__(self, base: nn.Module, target_modules: Any) -> None:
        self.places = find(base, target_modules)
        first = {id(place.layer): place for place in reversed(self.places)}
        self.named = {place.name: place for place in self.places if first[id(place.layer)] is place}
        devices = {next(place.base.parameters()).device for place in self.named.values()}
        if len(devices) > 1:
            raise ValueError(f"model: got layers on {sorted(map(str, devices))}, wanted all on one device")
        self.device = devices.pop()

    def fill(self) -> dict[str, MultiLoRALinear]:
        """MultiLoRALinear in each place.   Returns them by name."""
        layers = {}
        for name, place in self.named.items():
            K, N = sizes(place.base) or (0, 0)
            layers[name] = MultiLoRALinear(place.base, K, N).train(place.base.training)
        ours = {id(place.layer): layers[name] for name, place in self.named.items()}
        for place in self.places:
            setattr(place.parent, place.child, ours[id(place.layer)])
        return layers

    def clear(self) -> None:
        """Everything back as it was."""
        for place in self.places:
            setattr(place.parent, place.child, place.layer)


class Attached:
    """A model's layers under MultiLoRALinear.

    layers: by name.   groups: those called with one tensor together.   target: what adapters must fit.
    """

    def __init__(self, model: nn.Module, target_modules: Any, slots: int, rows: int, dtype: torch.dtype | None) -> None:
        self.model, self.base = model, base_model(model)
        self._seats = Seats(self.base, target_modules)
        named = self._seats.named
        for place in named.values():
            if getattr(place.layer, "merged", False) is True:
                raise ValueError(f"model: got merged adapters in {place.name}; unmerge_adapter() first")
        self.target = _target(self.base, named, dtype)
        self.device = self._seats.device
        self.tables = Tables.empty(slots, rows, self.device)
        traced = {name: place.layer for name, place in named.items()}
        calls, failed = groups.trace(self.base, traced, ids=IDS)
        flat = _flat(calls)
        together = groups.runs(self.base, traced, calls, ops.GROUP)
        self.layers = self._seats.fill()
        for name, layer in self.layers.items():
            layer.flat = name in flat
            layer.seen = failed is not None or any(call.name == name for call in calls)
        self.groups = [Group([self.layers[name] for name in run], self.tables, self.target.dtype) for run in together]
        self.names = together

    def detach(self) -> None:
        """Everything back as it was."""
        self._seats.clear()

    def loaded(self) -> Iterator[tuple[str, Adapter]]:
        """The adapters that PEFT had on the layers."""
        for name, config in _configs(self.model).items():
            state, scaling, ranks = {}, {}, {}
            for place in self._seats.places:
                layer: Any = place.layer
                if name in getattr(layer, "lora_A", ()):
                    state[f"{place.name}.lora_A.weight"] = layer.lora_A[name].weight
                    state[f"{place.name}.lora_B.weight"] = layer.lora_B[name].weight
                    if layer.lora_B[name].bias is not None:
                        state[f"{place.name}.lora_B.bias"] = layer.lora_B[name].bias
                    scaling[place.name] = float(layer.scaling[name])
                    ranks[re.escape(place.name)] = len(layer.lora_A[name].weight)  # hotswap pads, config stays behind
            # this base is the one they were made on
            options = {**config.to_dict(), "init_lora_weights": True, "rank_pattern": ranks}
            factors = read(state, options, self.target, name).factors
            yield name, Adapter.lora({layer: replace(f, scaling=scaling[layer]) for layer, f in factors.items()})


def _flat(calls: list[groups.Call]) -> set[str]:
    """The layers that take a batch in one dimension.

    Raises ValueError for layers whose rows begin with anything but the requests, in their order.
    """
    flat, wrong = set(), {}
    rows, tokens = IDS
    for call in calls:
        first, *others = call.x.shape[:-1]
        if not others and first in (rows, rows * tokens):
            flat.add(call.name)
        elif first != rows:
            wrong[call.name] = tuple(call.x.shape)
    if wrong:
        name, shape = next(iter(wrong.items()))
        raise ValueError(
            f"model: got {len(wrong)} layers whose rows do not begin with the requests ({name} is called with "
            f"{shape} for {rows} requests of {tokens} tokens), wanted [requests, tokens, features]; leave them out by "
            f"target_modules: {', '.join(wrong)}"
        )
    return flat


def _target(base: Any, places: dict[str, Place], dtype: torch.dtype | None) -> Target:
    layers = {name: sizes(place.base) or (0, 0) for name, place in places.items()}
    words = base.get_input_embeddings().weight
    modules = {name for name, _ in base.named_modules()}
    encoder_decoder = bool(getattr(base.config, "is_encoder_decoder", False))
    embedding = words.shape[1], words.dtype
    return Target(layers, dtype or words.dtype, modules, embedding, encoder_decoder, functools.partial(_weight, base))


def _weight(base: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, in PEFT's layers or ours too; None for a name that is none."""
    module, _, last = name.replace(".base_layer.", ".").rpartition(".")
    try:
        found: Any = base.get_submodule(module)
    except AttributeError:
        return None
    weight = getattr(getattr(found, "base_layer", found), last, None)
    return weight if isinstance(weight, Tensor) else None
