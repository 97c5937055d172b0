"""What a gated MLP's forward reads, beside x and its layers, found in its code and in that of its activation.

A trace shows one way through a forward; another may be open tomorrow, after a setting has changed. What can be compared
at every call in a fraction of a microsecond is; an MLP that reads anything else is left to its own forward.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
_BOXES = (tuple, list, dict, set, frozenset)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
_UNSEEN = {
    *("getattr", "hasattr", "vars", "eval", "exec", "globals", "locals", "__dict__", "AttributeError"),
    *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype"),
    *("get_default_dtype", "is_compiling", "backends"),
}
"""With these a forward reads what its code does not name, what is not there yet, or a state of torch's."""

_KNOWN = {"torch", "numpy", "builtins", "math", "operator", "functools", "contextlib", "typing", "types", "abc", "enum"}
_MISSING = object()


class _Unwatched(Exception):
    """Why a forward cannot be watched."""


class Function(NamedTuple):
    """A function of a class, with its code, as it was traced."""

    owner: Any
    name: str
    function: Any
    code: Any

    def __reduce__(self) -> Any:  # code cannot be pickled
        return _again, (self.owner, self.name, _told(self.code))


def _again(owner: Any, name: str, told: Any) -> Function:
    """The function as it is where it was unpickled; None, which none is equal to, where the code is another."""
    function = getattr(owner, name, None)
    code = getattr(function, "__code__", None)
    return Function(owner, name, function, code) if code and _told(code) == told else Function(owner, name, None, None)


def _told(code: Any) -> Any:
    if code is None:
        return None
    return code.co_code, code.co_names, tuple(c for c in code.co_consts if not isinstance(c, CodeType))


class Reads(NamedTuple):
    """kinds: (child, its class) of the activation.   values: (child, attribute, attribute of that) → what it was; the
    child "" is the module itself.   functions: those of classes."""

    kinds: tuple[tuple[str, type], ...] = ()
    values: tuple[tuple[tuple[str, str, str], Any], ...] = ()
    functions: tuple[Function, ...] = ()

    def changed(self, module: Any) -> str | None:
        """What is no longer as it was."""
        parts = module._modules
        for child, kind in self.kinds:
            if type(parts[child]) is not kind:
                return f"{child}.__class__"
        for (child, attribute, inner), value in self.values:
            now = getattr(parts[child] if child else module, attribute, None)
            if inner:
                now = getattr(now, inner, None)
            if now is not value and (type(now) is not type(value) or now != value):
                return ".".join(filter(None, (child, attribute, inner)))
        for owner, name, function, code in self.functions:
            now = getattr(owner, name, None)
            if now is None or now is not function or now.__code__ is not code:
                return f"{owner.__name__}.{name}"
        return None


def reads(module: nn.Module, layers: tuple[str, ...], acts: tuple[str, ...]) -> Reads | str:
    """What to watch of an MLP of these children; or what it reads that cannot be watched."""
    reader = _Reader(module, layers, acts)
    try:
        for child in ("", *acts):
            reader.part(child)
    except _Unwatched as reason:
        return str(reason)
    kinds = tuple((act, type(module._modules[act])) for act in acts)
    return Reads(kinds, tuple(sorted(reader.values.items())), tuple(reader.functions.values()))


class _Reader:
    def __init__(self, module: nn.Module, layers: tuple[str, ...], acts: tuple[str, ...]) -> None:
        self.module, self.layers, self.acts = module, layers, acts
        self.values: dict[tuple[str, str, str], Any] = {}
        self.functions: dict[tuple[Any, str], Function] = {}
        self.seen: set[tuple[str, int]] = set()

    def part(self, child: str) -> None:
        """The module, or a child of its activation."""
        part: Any = self.module._modules[child] if child else self.module
        kind = type(part)
        for own in _own(kind):
            for name in ("__getattr__", "__getattribute__", "__call__"):
                if name in vars(own):
                    raise _Unwatched(f"its {own.__name__} has a {name} of its own")
        if _known(kind.__module__):
            forward: Any = kind.forward
            self.functions[kind, "forward"] = Function(kind, "forward", forward, forward.__code__)
            for name, value in vars(part).items():
                if name[0] != "_" and name not in ("training", "forward"):
                    self.attribute(child, name, value, set())
        else:
            self.method(child, kind, "forward", kind.forward)

    def method(self, child: str, owner: type, name: str, found: Any) -> None:
        """What a class has by that name."""
        found = found.__func__ if isinstance(found, staticmethod) else found
        if type(found) is not FunctionType:
            raise _Unwatched(f"its forward reads {name}, a {type(found).__name__} of its class")
        self.functions[owner, name] = Function(owner, name, found, found.__code__)
        self.function(child, found)

    def function(self, child: str, function: FunctionType) -> None:
        """Whatever the code of a function names, on behalf of a child."""
        if (child, id(function)) in self.seen:
            return
        self.seen.add((child, id(function)))
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = {name: cell.cell_contents for name, cell in cells}
        if _known(function.__globals__.get("__name__")):  # of torch's, such as no_grad's, around one of the user's
            for value in closure.values():
                if isinstance(value, FunctionType):
                    self.function(child, value)
            return
        outer, names = _names(function.__code__)
        for name in sorted(names & _UNSEEN):
            raise _Unwatched(f"its forward uses {name}")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not isinstance(value, _SIMPLE):
                self.outside(child, "a default", value, names)
        for name, value in closure.items():
            self.outside(child, name, value, names)
        for name in sorted(outer & set(function.__globals__)):
            self.outside(child, name, function.__globals__[name], names)
        for name in sorted(names):
            self.named(child, name, names)

    def named(self, child: str, name: str, names: set[str]) -> None:
        """An attribute, of that name, of the child or of what it can reach."""
        for each in [child] if child else ["", *self.acts, *self.layers]:
            part: Any = self.module._modules[each] if each else self.module
            if (not each and name in (*self.acts, *self.layers)) or name == "training":
                continue
            if each not in self.layers and name in {**part._modules, **part._parameters, **part._buffers}:
                raise _Unwatched(f"its forward reads {name}, of which a trace shows one state")
            if name in vars(part):
                self.attribute(each, name, vars(part)[name], names)
            elif each not in self.layers:
                self.inherited(each, type(part), name)

    def inherited(self, child: str, kind: type, name: str) -> None:
        found = next((vars(own)[name] for own in _own(kind) if name in vars(own)), _MISSING)
        if isinstance(found, _SIMPLE):
            self.values[child, name, ""] = found
        elif found is not _MISSING:
            self.method(child, kind, name, getattr(kind, name) if isinstance(found, FunctionType) else found)
            for own in _own(kind):  # super's too
                if name in vars(own):
                    self.method(child, own, name, vars(own)[name])

    def attribute(self, child: str, name: str, value: Any, names: set[str]) -> None:
        """What an instance has."""
        if isinstance(value, _FUNCTIONS):
            self.outside(child, name, value, names)
            self.values[child, name, ""] = value
        elif isinstance(value, _SIMPLE):
            self.values[child, name, ""] = value
        elif type(value) in _BOXES and _simple(value):
            self.values[child, name, ""] = value.copy() if hasattr(value, "copy") else value
        elif type(value) in _BOXES or isinstance(value, (Tensor, nn.Module)) or callable(value):
            raise _Unwatched(f"its forward reads {name}, a {type(value).__name__} that cannot be watched")
        else:
            self.inside(child, name, value, names)

    def inside(self, child: str, name: str, value: Any, names: set[str]) -> None:
        """What is read of an object, such as a config."""
        found = False
        for inner in sorted(names - {name}):
            try:
                now = getattr(value, inner)
            except Exception:  # it has none
                continue
            if not isinstance(now, _SIMPLE):
                raise _Unwatched(f"its forward reads {name}.{inner}, a {type(now).__name__} that cannot be watched")
            self.values[child, name, inner] = now
            found = True
        if not found:
            raise _Unwatched(f"its forward reads {name}, a {type(value).__name__} that cannot be watched")

    def outside(self, child: str, name: str, value: Any, names: set[str]) -> None:
        """A global, or what a closure or a function holds."""
        if isinstance(value, FunctionType):
            self.function(child, value)
        elif isinstance(value, MethodType):
            if not isinstance(value.__self__, type) and value.__self__ not in (self.module, *self.module.children()):
                raise _Unwatched(f"its forward reads {name}, a method of another object")
            self.outside(child, name, value.__func__, names)
            if isinstance(value.__self__, type):
                self.outside(child, name, value.__self__, names)
        elif isinstance(value, partial):
            for each in (value.func, *value.args, *value.keywords.values()):
                if not isinstance(each, _SIMPLE):
                    self.outside(child, name, each, names)
        elif isinstance(value, (type, ModuleType)):
            self.members(child, value, names)
        elif not isinstance(value, BuiltinFunctionType) or not isinstance(
            value.__self__, (type, ModuleType, type(None))
        ):
            raise _Unwatched(f"its forward reads {name}, a {type(value).__name__} outside of it")

    def members(self, child: str, holder: Any, names: set[str]) -> None:
        """What is read of a module or a class; functions of a class may be called without being named."""
        owners = [holder] if isinstance(holder, ModuleType) else [*_own(holder)]
        kind: Any = type(self.module)
        for owner in owners:
            if _known(getattr(owner, "__module__", owner.__name__)) or owner in kind.__mro__:
                continue
            if ("", id(owner)) in self.seen:
                continue
            self.seen.add(("", id(owner)))
            for name, value in vars(owner).items():
                value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if name in names or (isinstance(owner, type) and type(value) is FunctionType):
                    self.outside(child, f"{owner.__name__}.{name}", value, names)


def _own(kind: type) -> Iterator[type]:
    """The classes of a class that are not torch's or Python's."""
    return (own for own in kind.__mro__ if not _known(own.__module__))


def _known(module: Any) -> bool:
    """Whether the module of that name is one whose functions are taken to depend on their arguments alone."""
    return str(module).partition(".")[0] in _KNOWN


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """(globals, others) that the code and what it defines name; a text is another, for it may be a name to come."""
    steps = list(dis.get_instructions(code))
    if any(step.opname == "IMPORT_NAME" for step in steps):
        raise _Unwatched("its forward imports something")
    outer = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")}
    names = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            further = _names(inner)
            outer, names = outer | further[0], names | further[1]
    return outer, names


def _simple(box: Any) -> bool:
    return all(isinstance(v, _SIMPLE) for v in ((*box, *box.values()) if isinstance(box, dict) else box))
