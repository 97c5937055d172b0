"""A gated MLP around PEFT's layers runs as one op: one forward and one backward for gate, up, activation and down.

A patched MLP is the model's own object under a subclass of its own class; its children stay as they are. At each call
the one judge says of each of them whether it may be passed over; if not, the class's own forward calls them one by one.
"""

from __future__ import annotations

import copyreg
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastlora import dispatch, functional
from fastlora.dispatch import Decision, env
from fastlora.functional import Projection
from fastlora.peft.judge import LIBRARY, Plan, autocast_of, hooked, judge, judge_call, own, plain_weight
from fastlora.peft.siblings import enter, forget
from fastlora.peft.structure import Structure, find, looks_like_one

OPT_OUT = "fastlora_gated"
"""Set to False on a module, at any time: it runs layer by layer."""

FEW = "few rows: calls cost more than arithmetic"


class _Gated(nn.Module):
    """The forward of every patched MLP, ahead of its own class in the method order: super().forward is its own."""

    _structure: Structure | None = None
    fastlora_gated = True
    enters = True  # its siblings need no hooks: 16 µs of a cold call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """y = down(act(gate(x)) * up(x)) of x: [..., K]."""
        if not isinstance(self, _Gated):  # unpatched, and somebody kept this method of it
            return type(self).forward(self, *args, **kwargs)
        structure = self._structure
        x: Any = _only(structure.x, args, kwargs) if structure is not None else None
        layers = projections(self, x) if x is not None else "further arguments"
        if layers == FEW:
            return super().forward(*args, **kwargs)
        if structure is None or isinstance(layers, str):
            enter(self, args)
            try:
                return super().forward(*args, **kwargs)
            finally:
                forget(self, args, None)
        gate, up, down = layers
        return functional.lora_gated_mlp(x, gate, up, down, structure.activation)

    def decide(self, x: Tensor) -> Decision:
        """Which path forward would take for x, and why."""
        s = self._structure
        layers = projections(self, x) if s is not None else "it was unpatched"
        if s is None or isinstance(layers, str):
            return Decision("layers", None, None, f"its layers one by one: {layers}")
        R = max(len(layer.lora_A) for layer in layers if layer.lora_A is not None)
        decision = dispatch.decide(x, len(layers[0].weight), R, dtype=autocast_of(x))
        return replace(decision, why=f"{decision.why}; {told(s)}")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        _watch(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        make, arguments, *state = reduced
        if make is not copyreg.__newobj__ or not _made_here(type(self)):  # type: ignore[attr-defined]
            return reduced  # its class has a way of its own
        return _new, (type(self).__bases__[1], *arguments[1:]), *state


def told(structure: Structure) -> str:
    return f"one gated MLP ({structure.activation}) of {structure.gate}, {structure.up}, {structure.down}"


@cache
def _class(own: Any) -> Any:
    """A class of the same name over `own`, with our forward."""
    return type(own.__name__, (_Gated, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def _made_here(cls: type) -> bool:
    """Whether it is a class of `_class`, not one that FSDP2 made over it."""
    return cls.__bases__[0] is _Gated


def _new(own: type, *arguments: Any) -> Any:
    """What pickle and deepcopy begin a patched MLP with: its class is made here, so it has no name to be found by."""
    cls = _class(own)
    return cls.__new__(cls, *arguments)


def _only(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument; None when there are others."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return kwargs[name] if not args and len(kwargs) == 1 and name in kwargs else None


def projections(module: Any, x: Tensor | None = None) -> list[Projection] | str:
    """What to run for a patched MLP as it stands now, on x if given; or why its layers must run one by one."""
    structure, parts = module._structure, module._modules
    if env.disable:
        return "FASTLORA_DISABLE=1"
    if module.fastlora_gated is False:
        return f"{OPT_OUT} is False"
    if isinstance(x, Tensor) and not functional.together(x, dispatch.backend_for(x), 2):
        return FEW
    changed = _changed(module, structure)
    if changed is not None:
        return changed
    layers: list[Projection] = []
    for name in structure.layers:
        plan = _plan(parts[name], x)
        if isinstance(plan, str):
            return f"{name}: {plan}"
        bias = own(plan.base, "bias")
        if plan.adapters:
            a, b, scaling, lora_bias, p, training = plan.adapters[0]
            layers.append(Projection(plan.weight, bias, a, b, scaling, lora_bias, p if training else 0.0))  # type: ignore[arg-type]
        else:
            layers.append(Projection(plan.weight, bias))  # type: ignore[arg-type]
    if all(layer.lora_A is None for layer in layers):
        return "no active adapter in it"
    return layers


def _changed(module: Any, structure: Structure) -> str | None:
    """What is no longer as it was traced, or would be passed over unseen."""
    parts = module._modules
    for name in (*structure.layers, *structure.acts):
        if parts.get(name) is None:
            return f"{name} is gone"
        if hooked(parts[name]):
            return f"{name} has hooks, or a forward of its own"
    changed = structure.reads.changed(module)
    return None if changed is None else f"{changed} was changed since it was patched"


def _plan(layer: Any, x: Tensor | None) -> Plan | str:
    """What `layer`, of PEFT's or plain, would run, with at most one adapter over a plain weight; or why not."""
    if type(layer) not in LIBRARY:
        if layer.__dict__.get("_hf_tp_plan") is not None:
            return "it is tensor-parallel (_hf_tp_plan)"
        weight = plain_weight(layer)
        if isinstance(weight, str):
            return f"the layer{weight}"
        if x is not None and weight.dtype != x.dtype and autocast_of(x) is None:
            return f"x is {x.dtype} and its weight {weight.dtype}, with autocast off"
        return Plan(layer, weight, [])
    if layer._disable_adapters:
        return "its adapters are disabled"
    plan = judge(layer) if x is None else judge_call(layer, x, (), {})
    if isinstance(plan, str):
        return plan
    if plan.weight is None:
        return "its base is quantised"
    if len(plan.adapters) > 1:
        return f"{len(plan.adapters)} active adapters"
    return plan


def gate(model: nn.Module, lora: set[int], wanted: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Swap the class of every gated MLP that has a LoRA layer in it.   lora: the ids of the model's LoRA layers.

    Returns (name → how it runs, name → why an MLP is left to run layer by layer).   A state that forbids it now (hooks,
    merged) may clear: then the MLP runs as one after all.
    """
    gated: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        adapted = [child for child in module.children() if id(child) in lora]
        if not adapted:
            continue
        structure = find(module)
        if structure is None:
            continue
        if isinstance(structure, str):
            if looks_like_one(module):
                left[name] = structure
        elif "forward" in module.__dict__:
            left[name] = "its forward was replaced on the instance"
        elif not wanted:
            left[name] = "patch(gated=False)"
        else:
            kind: Any = type(module)
            module.__class__ = _class(kind)
            module._structure = structure
            _watch(module)
            layers = projections(module)
            if isinstance(layers, str):
                left[name] = layers
            else:
                gated[name] = told(structure)
    return gated, left


def _watch(module: nn.Module) -> None:
    """Let the module have its own class back when its LoRA layers are gone; a copy of it too."""
    for child in module.children():
        if type(child) in LIBRARY:
            weakref.finalize(child, _release, weakref.ref(module))


def _release(reference: weakref.ref[nn.Module]) -> None:
    """After a LoRA layer is gone: if it was the MLP's last (merge_and_unload), nothing of ours stays either."""
    module = reference()
    if module is not None and not any(type(child) in LIBRARY for child in module.children()):
        ungate(module)


def ungate(model: nn.Module) -> None:
    """Give every patched MLP its own class back."""
    for module in model.modules():
        if isinstance(module, _Gated):
            module.__dict__.pop("_structure", None)  # which alone turns it off, where FSDP2 made a class over ours
            if _made_here(type(module)):
                module.__class__ = type(module).__bases__[1]
