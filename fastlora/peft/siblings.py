"""Layers that a model calls with the same tensor run as one group: the first call computes for all of them.

What it leaves for its siblings is kept by the tensor's identity and version, for this thread alone, and only until the
last of them has come: a call with anything else drops it, and so does the end of their parent's forward, by return, by
an exception, or by a checkpoint that stops its recomputation early. Outside of that forward, which alone can tell when
nobody comes any more, and in a checkpoint of a part of it, which is recomputed outside, layers run one by one. A
compiler that is given one of them alone does not see that: its graph computes for all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as saving_hooks
from torch.compiler import is_compiling

from fastlora import dispatch, functional
from fastlora.groups import owner
from fastlora.modules import own
from fastlora.peft.judge import Plan, autocast_of, judge_call


@dataclass
class _Left:
    """ys: by member, None once it was fetched.   keys: what each member would have run."""

    siblings: Siblings
    x: Tensor
    version: int | None
    modes: tuple[Any, ...]
    keys: list[Any]
    ys: list[Tensor | None]


class _Slot:
    """Where the one group whose siblings are still to come leaves their outputs."""

    def __init__(self) -> None:  # not on the class: a compiler's guards would see it appear
        self.left: _Left | None = None


class _ThreadSlot(_Slot, threading.local):
    """callers: what `_saving` gave at the start of each caller's forward that is running, the innermost last."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[Any] = []


_here = _ThreadSlot()
_traced = _Slot()
"""While a compiler traces, which cannot see a threading.local: what is left there is gone by the end of the trace."""


def _slot() -> _Slot:
    return _traced if is_compiling() else _here


def _saving() -> tuple[Any, ...]:
    """Whether tensors are kept for backward, and by which hooks: those of a checkpoint are its own."""
    return is_grad_enabled(), saving_hooks(False)


def enter(caller: Any, args: Any) -> None:
    """A hook on who calls the siblings: from here on `forget` will come."""
    if not is_compiling():
        _here.callers.append(_saving())


def forget(caller: Any, args: Any, output: Any) -> None:
    """A hook on who calls the siblings: what nobody fetched is dropped when its forward ends, however it ends."""
    if _traced.left is not None:  # which a graph that ends between siblings leaves to those who run it
        _traced.left = None
    if not is_compiling():
        _here.left = None
        del _here.callers[-1:]


@torch._dynamo.assume_constant_result
def _opaque_to_the_compiler() -> bool:
    """Whether the trace is inside a checkpoint, from which nothing may be left outside of its own values."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except AttributeError:  # another torch: then one by one, which is right everywhere
        return True


@torch._dynamo.assume_constant_result
def _version_in_trace() -> int | None:
    """The version of what the trace's last group was given, at this point of the trace; None in another graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    for node in reversed(InstructionTranslator.current_tx().output.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.fastlora.lora_group:
            x = node.args[0]
            value = x.meta["example_value"]
            if x.op == "call_method" and x.target == "to" and value.dtype == autocast_of(value):  # the group's own cast
                value = x.args[0].meta["example_value"]
            return int(value._version)
    return None


def _modes(x: Tensor) -> tuple[Any, ...]:
    """What an output depends on beside x and the layer, and what keeps its tensors for backward.

    A checkpoint keeps those of its own frame, and recomputes what it saw: a layer in it, whose sibling was called
    outside, has to run inside.
    """
    hooks = None if is_compiling() else saving_hooks(False)
    return is_grad_enabled(), x.requires_grad, autocast_of(x), hooks


def _key(plan: Plan) -> Any:
    """What a layer would run, down to the versions of its tensors."""
    if is_compiling():  # which guards on all of it
        return None
    tensors = [plan.weight, own(plan.base, "bias")]
    numbers: list[Any] = []
    for a, b, scaling, lora_bias, p, training in plan.adapters:
        tensors += [a, b, lora_bias]
        numbers += [scaling if isinstance(scaling, float) else id(scaling), p, training]
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors if t is not None], numbers


def _gone() -> None:
    """What a weak reference to a layer that is gone gives."""


class Siblings:
    """Layers of PEFT's, patched, that one forward calls one after another with the same tensor.

    layers: weak references, so that a model is gone with the last name of it, and a layer with its place in the model.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers: list[Callable[[], Any]] = [weakref.ref(layer) for layer in layers]
        for index, layer in enumerate(layers):
            layer._siblings, layer._index = self, index

    def __getstate__(self) -> list[Any]:
        return [layer() for layer in self.layers]

    def __setstate__(self, layers: list[Any]) -> None:
        self.layers = [_gone if layer is None else weakref.ref(layer) for layer in layers]

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside, they run as in their caller's forward."""
        enter(self, ())
        try:
            yield
        finally:
            forget(self, (), None)

    def run(self, index: int, x: Tensor, plan: Plan) -> Tensor | None:
        """The layer's output, its own or what a sibling left; None where it runs by itself."""
        compiling = is_compiling()
        if _opaque_to_the_compiler() if compiling else _here.callers[-1:] != [_saving()]:
            return None
        slot = _slot()
        left = slot.left
        if left is not None:
            slot.left = None
            version = _version_in_trace() if compiling else None if x.is_inference() else x._version
            if left.siblings is self and left.x is x and left.version == version is not None:
                y = left.ys[index]
                if y is not None and left.modes == _modes(x) and left.keys[index] == _key(plan):
                    left.ys[index] = None
                    if any(other is not None for other in left.ys):
                        slot.left = left
                    return y
        plans = self.plans(index, x, plan)
        if isinstance(plans, str):
            return None
        ys: list[Tensor | None] = list(_compute(x, plans))
        y, ys[index] = ys[index], None
        version = _version_in_trace() if compiling else x._version
        slot.left = _Left(self, x, version, _modes(x), [_key(other) for other in plans], ys)
        return y

    def plans(self, index: int, x: Tensor, plan: Plan) -> list[Plan] | str:
        """What every member would run on x; or why they run one by one.   plan: of the member at index."""
        if not functional.together(x, dispatch.backend_for(x), len(self.layers)):
            return "few rows: calls cost more than arithmetic"
        if not is_compiling() and x.is_inference():
            return "an inference tensor does not tell when it has changed"
        plans = []
        for i, reference in enumerate(self.layers):
            layer = reference()
            if layer is None:
                return "one of them is gone"
            if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return f"{layer._name} has hooks that may change its input"
            theirs = plan if i == index else "its adapters are disabled" if layer._disable_adapters else None
            theirs = judge_call(layer, x, (), {}) if theirs is None else theirs
            if isinstance(theirs, str):
                return f"{layer._name}: {theirs}"
            if theirs.weight is None or len(theirs.adapters) > 1:
                return f"{layer._name} has a quantised base, or several active adapters"
            plans.append(theirs)
        return plans

    def explain(self, index: int, x: Tensor, plan: Plan) -> str:
        """How `run` would go."""
        layers = [layer for i, reference in enumerate(self.layers) if i != index and (layer := reference()) is not None]
        others = ", ".join(layer._name.split(".")[-1] for layer in layers)
        plans = self.plans(index, x, plan)
        if isinstance(plans, str):
            return f"apart from {others}: {plans}"
        return f"one group with {others}; one by one outside of their caller's forward, or in a compiled checkpoint"


def _compute(x: Tensor, plans: Sequence[Plan]) -> tuple[Tensor, ...]:
    none = (None, None, 1.0, None, 0.0, False)
    as_, bs, scalings, lora_biases, ps, training = zip(
        *(tuple(plan.adapters[0]) if plan.adapters else none for plan in plans), strict=True
    )
    return functional.lora_linear_group(
        x,
        [plan.weight for plan in plans if plan.weight is not None],
        [own(plan.base, "bias") for plan in plans],
        as_,
        bs,
        scalings,
        dropout_p=[p if train else 0.0 for p, train in zip(ps, training, strict=True)],
        lora_biases=lora_biases,
    )


class _Calls:
    """Kept by a module that calls siblings: when the last of their layers is gone (merge_and_unload), so are our hooks.

    A copy of the module, pickled or not, has one of its own.
    """

    def __init__(self, caller: nn.Module, groups: list[Siblings]) -> None:
        self.__setstate__((caller, groups))

    def __getstate__(self) -> tuple[Any, list[Siblings]]:
        return self.caller(), self.left()

    def __setstate__(self, state: tuple[Any, list[Siblings]]) -> None:
        caller, groups = state
        self.caller: Callable[[], Any] = _gone if caller is None else weakref.ref(caller)
        self.groups = [weakref.ref(group) for group in groups]
        for group in groups:
            weakref.finalize(group, self.check)

    def left(self) -> list[Siblings]:
        return [group for reference in self.groups if (group := reference()) is not None]

    def check(self) -> None:
        caller = self.caller()
        if caller is not None and caller.__dict__.get("_calls_siblings") is self and not self.left():
            _unhook(caller)


def join(model: nn.Module, names: Sequence[str], layers: dict[str, Any]) -> None:
    """Make siblings of the named layers, and let the module that calls them forget what nobody fetched."""
    siblings = Siblings([layers[name] for name in names])
    caller = owner(model, names)[0]
    if getattr(caller, "enters", False):
        return
    caller.register_forward_pre_hook(enter, prepend=True)
    caller.register_forward_hook(forget, always_call=True)
    before = caller.__dict__.get("_calls_siblings")
    caller.__dict__["_calls_siblings"] = _Calls(caller, [siblings, *(before.left() if before else [])])


def _unhook(module: nn.Module) -> None:
    module.__dict__.pop("_calls_siblings", None)
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is enter]:
        del module._forward_pre_hooks[key]
    for key in [key for key, hook in module._forward_hooks.items() if hook is forget]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def part(model: nn.Module) -> None:
    """Every layer by itself again, and no hook of ours left."""
    for module in model.modules():
        for name in ("_siblings", "_index"):
            module.__dict__.pop(name, None)
        _unhook(module)
