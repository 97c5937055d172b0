"""Gated MLPs found by what they compute: down(act(gate(x)) * up(x)) and nothing else, whatever the names.

The module's forward is traced with its children as leaves; what lies between gate and the product is evaluated in
float64 and compared with the five activations, so that gelu_pytorch_tanh, NewGELU and nn.GELU(approximate="tanh") are
one, and erf's is another; what comes back through it too, so that a stopped or a straight-through gradient is neither.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastlora.groups import Unwritten, unchanged
from fastlora.peft.reads import Reads, reads
from fastlora.reference import ACTIVATIONS

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")


class Structure(NamedTuple):
    """x: the name of forward's argument.   gate, up, down: children of the module.   activation: one of ACTIVATIONS.

    acts: the children that compute it.   reads: what its forward reads, as it was when it was traced.
    """

    x: str
    gate: str
    up: str
    down: str
    activation: str
    acts: tuple[str, ...]
    reads: Reads = Reads()

    @property
    def layers(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


class _Proxy(fx.Proxy):
    """A value that nobody iterates over: fx would read the caller's frame and keep it, and with it the whole model."""

    def __iter__(self) -> Iterator[fx.Proxy]:
        raise ValueError("it unpacks a value, as where gate and up are one layer")


class _Tracer(fx.Tracer):
    """Every child is a leaf; grad mode and autocast, which leave no trace in a graph, must stay as they were."""

    modes: tuple[Any, ...] = ()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise ValueError("it changes grad mode or autocast")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices),
    )


def find(module: nn.Module) -> Structure | str | None:
    """What the module is made of, if it is a gated MLP; otherwise why it is none, or None where nothing is gated."""
    found, before = None, module.training
    try:
        for training in (True, False):
            module.training = training
            with unchanged(module) as kept, Unwritten() as tensors:
                structure = _match(module)
                if not (structure is None or isinstance(structure, str)) and (kept() or tensors.writes):
                    structure = "it keeps something of what it computes"
            if structure is None or isinstance(structure, str):
                return structure
            if found not in (None, structure):
                return "it computes one thing in training and another in evaluation"
            found = structure
    finally:
        module.training = before
    assert found is not None
    read = reads(module, found.layers, found.acts)
    return read if isinstance(read, str) else found._replace(reads=read)


def looks_like_one(module: nn.Module) -> bool:
    """Whether someone would take the module for an MLP: a child is one of the activations, or it has three layers, two
    of one size and the third of the reverse."""
    leaves = [child for child in module.children() if not list(child.children())]
    with unchanged(module), Unwritten():
        if any(_named(leaf, [leaf]) is not None for leaf in leaves):
            return True
    sizes = [(getattr(child, "in_features", None), getattr(child, "out_features", None)) for child in module.children()]
    sizes = [size for size in sizes if all(type(each) is int for each in size)]  # a Bilinear has one of the two
    return len(sizes) == 3 and any(sorted(sizes) == sorted([size, size, size[::-1]]) for size in sizes)


def _match(module: nn.Module) -> Structure | str | None:
    tracer = _Tracer()
    tracer.modes = _modes()
    try:
        with Unwritten() as tensors:  # of its own, for x is none
            graph = tracer.trace(module)
    except Exception as error:  # a forward may do anything with a value that is no tensor
        return f"its forward cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        vars(tracer).clear()  # fx's closures keep it until a collection, and it keeps the module
    if not any(_product(node) for node in graph.nodes):
        return None
    if tensors.reads:
        return "its forward looks at a tensor of its own, or changes one"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs or any(node.users for node in inputs[1:]):
        return "its forward reads more than one argument"
    x, out = inputs[0], next(node for node in graph.nodes if node.op == "output")
    down: Any = out.args[0]
    if not _calls(down):
        return "its result is not a child's output"
    z: Any = down.args[0]
    if not _product(z):
        return f"{down.target} reads the output of {z.target}, not a product"
    for act, up in (z.args, z.args[::-1]):
        gate, between = _back(act, x)
        if gate is None or not between or not _calls(up) or up.args[0] is not x or up is gate:
            continue
        if len(graph.nodes) != len(inputs) + len(between) + 5:  # gate, up, product, down, output
            return "its forward does more than down(act(gate(x)) * up(x))"
        names = str(gate.target), str(up.target), str(down.target)
        acts = tuple(str(node.target) for node in between if node.op == "call_module")
        if len({*names, *acts}) != 3 + len(acts) or any("." in name for name in (*names, *acts)):
            return "its layers are not three children of its own"
        activation = _named(_function(module, gate, between), [module.get_submodule(name) for name in acts])
        if activation is None:
            return f"what follows {gate.target} is none of {', '.join(ACTIVATIONS)} with its gradient"
        return Structure(str(x.target), *names, activation, acts)
    return f"what {down.target} reads is not act(gate(x)) * up(x)"


def _product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs


def _calls(node: Any) -> bool:
    """Whether the node is a child called with one tensor."""
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs


def _back(act: Any, x: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The child called with x that `act` is computed from, and the nodes between, in order; None if there is more."""
    gate: fx.Node | None = None
    between: list[fx.Node] = []
    todo = [act]
    while todo:
        node = todo.pop()
        if node in between or node is gate:
            continue
        if _calls(node) and node.args[0] is x and gate is None:
            gate = node
        elif isinstance(node, fx.Node) and node.op in ("call_module", "call_function", "call_method"):
            between.append(node)
            todo.extend(node.all_input_nodes)
        else:
            return None, []
    order = list(x.graph.nodes)
    return gate, sorted(between, key=order.index)


def _function(module: nn.Module, gate: fx.Node, between: list[fx.Node]) -> Callable[[Tensor], Any]:
    """g ↦ what the nodes between compute."""

    def run(g: Tensor) -> Any:
        values: dict[fx.Node, Any] = {gate: g}
        for node in between:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            if node.op == "call_module":
                values[node] = module.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[between[-1]]

    return run


def _grid() -> Tensor:
    """[points] of both signs: 0, 1e-6 to past the largest of fp32, what is not finite; a clip or a scale shows."""
    positive = torch.cat((torch.logspace(-6, 39, 451, dtype=torch.float64), torch.linspace(0.1, 12, 120).double()))
    return torch.cat((positive, -positive, torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)))


def _named(function: Any, acts: list[nn.Module]) -> str | None:
    """Which of ACTIVATIONS the function is, its derivative too, to 1e-9; None if none, or if what computes it has
    tensors or parts."""
    for act in acts:
        if next(act.parameters(), None) is not None or next(act.buffers(), None) is not None or list(act.children()):
            return None
    results = []
    training = [act.training for act in acts]
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            g = _grid()
            for mode in (True, False):
                for act in acts:
                    act.training = mode
                with torch.no_grad():
                    results.append(function(g.clone()))
                with torch.enable_grad():
                    results += _differentiated(function, g)
    except Exception:  # whatever it is, it is no function of one tensor
        return None
    finally:
        for act, before in zip(acts, training, strict=True):
            act.training = before
    for name, formula in ACTIVATIONS.items():
        with torch.inference_mode(False), torch.enable_grad():
            expected = [formula(g), *_differentiated(formula, g)] * 2
        if all(_same(result, wanted) for result, wanted in zip(results, expected, strict=True)):
            return name
    return None


def _differentiated(function: Callable[[Tensor], Any], g: Tensor) -> list[Tensor]:
    """function(g) and, where g is finite and no kink of a ReLU, what comes back of a small and of a large gradient."""
    inner = g.clone().requires_grad_()
    result = function(inner.clone())  # which it may change in place
    smooth = g.isfinite() & (g != 0)
    gradients = []
    for size in (1e-3, -1e6):
        dz = torch.zeros_like(g).masked_fill_(smooth, size)  # where() of two numbers has torch's default dtype
        (dg,) = torch.autograd.grad(result, inner, dz, retain_graph=True)
        gradients.append((dg / size)[smooth])
    return [result.detach(), *gradients]


def _same(result: Any, expected: Tensor) -> bool:
    return (
        isinstance(result, Tensor)
        and result.shape == expected.shape
        and result.dtype == expected.dtype
        and torch.allclose(result, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    )
