"""Layers that are called with the same tensor, found by running the model once on tensors without storage."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import random
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

log = logging.getLogger("fastlora")
_TORCHS_LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""Of an op that a tensor without storage cannot run it prints a traceback of 20 lines."""

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)
_NESTED = 2
"""How deep below a module's own dict a forward's side effects are looked for: further down lies the world."""


def siblings(
    model: nn.Module, layers: Mapping[str, nn.Module], together: int, inputs: dict[str, Any] | None = None
) -> tuple[list[list[str]], str | None]:
    """The names of `layers`, grouped: those called one after another with the same tensor, at most `together` of them.

    In evaluation and in training: where each drops some of the tensor for itself, a group would run for every one.
    inputs: what to call the model with; None guesses: a Hugging Face model's ids, or for each argument that the model
    cannot do without a float tensor as wide as the first layer.
    Returns the groups, every layer in one, and why the model could not be traced; then each layer is by itself.
    """
    calls, reason = trace(model, layers, inputs)
    if reason is not None:
        log.info("fastlora: layers stay ungrouped: %s", reason)
    groups = runs(model, layers, calls, together)
    if any(len(group) > 1 for group in groups):
        calls, failed = trace(model, layers, inputs, training=True)
        trained = groups if failed else runs(model, layers, calls, together)
        groups = [part for group in groups for part in ([group] if group in trained else [[name] for name in group])]
    return groups, reason


def runs(model: nn.Module, layers: Iterable[str], calls: list[Call], together: int) -> list[list[str]]:
    """The names of `layers`, grouped by their calls as `siblings` does."""
    groups = list(_runs(model, calls, together))
    seen = {name for group in groups for name in group}
    return groups + [[name] for name in layers if name not in seen]


def trace(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: dict[str, Any] | None = None,
    ids: tuple[int, int] = (1, 4),
    training: bool = False,
) -> tuple[list[Call], str | None]:
    """The calls of `layers` in one run of the model, in their order, and why there could be none.

    inputs: as in `siblings`.   ids: the shape of what is guessed.
    """
    calls: list[Call] = []
    reason = None  # the first guess's, if all fail: it was the likeliest
    for guess in [inputs] if inputs is not None else _guesses(model, layers, ids):
        calls.clear()
        made: list[weakref.ref[Tensor]] = []
        with _quiet(model, layers, calls, training):
            failed = _trace(model, guess, made)
        told = {id(call.x): torch.empty(call.x.shape, dtype=call.x.dtype, device="meta") for call in calls}
        calls[:] = [call._replace(x=told[id(call.x)]) for call in calls]  # so that nothing of the trace need be left
        _forget(made)
        if failed is None:
            return calls, None
        reason = reason or failed
    return [], reason


class Call(NamedTuple):
    """A layer's call.   x: what with, without storage.   version: x's, by which a change in place is seen."""

    name: str
    x: Tensor
    version: int


@contextlib.contextmanager
def _quiet(model: nn.Module, layers: Mapping[str, nn.Module], calls: list[Call], training: bool) -> Iterator[None]:
    """Inside, a run of the model notes the calls of `layers` and changes nothing that outlives it.

    It runs in one mode and without hooks, and linear layers only give a tensor of their output's shape: quantised
    ones would convert their weights, and some variants count their calls. What a module keeps for later (a mask, a
    cache) would be a tensor without storage ever after: every attribute is put back, and so are the random states;
    what it writes into a tensor goes into a copy. What it does to classes and globals is not undone.
    """
    names = {id(layer): name for name, layer in layers.items()}

    def stub(layer: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if id(layer) in names:
                calls.append(Call(names[id(layer)], x, x._version))
            return x.new_empty((*x.shape[:-1], _out_features(layer)))

        return forward

    with unchanged(model):
        for module in model.modules():
            vars(module).update(training=training, _forward_hooks={}, _forward_pre_hooks={})
            if id(module) in names or _linear(module):
                vars(module)["forward"] = stub(module)
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Inside, code of the model's may keep what it likes; on the way out attributes and random states are as they were.

    Gives a function: whether anything has been kept so far.   What is written into a tensor is `Unwritten`'s.
    """
    before: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        _note(vars(module), before, _NESTED)
    random_state, numpy = random.getstate(), sys.modules.get("numpy")  # which torch does without
    numpy_state = numpy.random.get_state() if numpy else None
    held = [value for container, _ in before.values() for value in _values(container)]
    rewinds = [rewind for value in held if (rewind := _rewind(value)) is not None]
    try:
        with torch.random.fork_rng(devices=()):
            yield lambda: any(_ids(container) != _ids(content) for container, content in before.values())
    finally:
        random.setstate(random_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for rewind in rewinds:
            rewind()
        for container, content in before.values():
            if _ids(container) != _ids(content):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _values(container: Any) -> Collection[Any]:
    values: Collection[Any] = container.values() if isinstance(container, dict) else container
    return values


def _rewind(value: Any) -> Callable[[], Any] | None:
    """What gives a random generator, which a model may have of its own, its state back; None for any other value."""
    kinds = getattr(sys.modules.get("numpy"), "random", None)
    if type(value) is random.Random:
        return functools.partial(value.setstate, value.getstate())
    if type(value) is torch.Generator:
        return functools.partial(value.set_state, value.get_state())
    if kinds and type(value) is kinds.RandomState:
        return functools.partial(value.set_state, value.get_state())
    if kinds and type(value) is kinds.Generator:
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _ids(container: Any) -> list[Any]:
    """Which objects are in it."""
    return (
        [(key, id(value)) for key, value in container.items()] if isinstance(container, dict) else [*map(id, container)]
    )


def _note(container: Any, noted: dict[int, tuple[Any, Any]], depth: int) -> None:
    """Add (container, a copy of what is in it), and those of the containers and the plain objects in it."""
    if id(container) in noted:
        return
    content = container.copy()
    noted[id(container)] = container, content
    if depth:
        for value in _values(content):
            if type(value) in _CONTAINERS:
                _note(value, noted, depth - 1)
            elif type(value).__dictoffset__ and not isinstance(value, (nn.Module, Tensor, type, ModuleType)):
                attributes = value.__dict__
                if type(attributes) is dict:  # a proxy may give anything
                    _note(attributes, noted, depth - 1)


class Unwritten(TorchDispatchMode):
    """Inside, an op that would write into a tensor made before writes into a copy: values and versions stay.

    reads, writes: whether an op has looked at such a tensor, and whether one would have changed it.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = False
        self._made: set[int] = set()
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outside = [t for t in tree_leaves((args, kwargs)) if self._outside(t)]
        self.reads = self.reads or bool(outside)
        for t in outside:  # whatever is written into it or a view of it: its version rises after the op has returned
            if not t.is_inference():
                self._versions.setdefault(id(t), (t, t._version))
        schema = getattr(func, "_schema", None)  # a higher-order op has none
        if schema is not None and schema.is_mutable:
            written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
            named = zip([a.name for a in schema.arguments], args, strict=False)
            args = [self._copied(value) if name in written else value for name, value in named]
            kwargs = {name: self._copied(value) if name in written else value for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        self._made.update(
            {_storage(t) for t in tree_leaves(out) if isinstance(t, Tensor)} - set(map(_storage, outside))
        )
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._versions:  # the first seen last: views share one counter
            tensors, versions = zip(*reversed(self._versions.values()), strict=True)
            torch._C._autograd._unsafe_set_version_counter(tensors, versions)

    def _outside(self, t: Any) -> bool:
        return isinstance(t, Tensor) and not isinstance(t, FakeTensor) and _storage(t) not in self._made

    def _copied(self, value: Any) -> Any:
        return tree_map_only(Tensor, self._copy, value)

    def _copy(self, t: Tensor) -> Tensor:
        if not self._outside(t):
            return t
        self.writes = True
        copy = t.clone()
        self._made.add(_storage(copy))
        return copy


class _Experts(TorchDispatchMode):
    """Inside, experts' grouped product has its shape in every dtype, where torch's rule for it knows bf16 alone.

    made: what ops give, noted.
    """

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:
            return args[0].new_empty(len(args[0]), args[1].shape[2])
        out = func(*args, **(kwargs or {}))
        self.made.extend(weakref.ref(t) for t in tree_leaves(out) if isinstance(t, FakeTensor))
        return out


def _forget(made: list[weakref.ref[Tensor]]) -> None:
    """Empty every lru_cache that holds a tensor of a trace: it would give it to all who ask, and they have no data.

    Transformers' vision models keep positions so, for all models of a class.   made: what the trace made. Where it is
    all gone, as nearly always, nothing is looked for.
    """
    if all(reference() is None for reference in made):
        return
    for cache in _caches():
        if _holds(gc.get_referents(cache), _NESTED):
            cache.cache_clear()


def _caches() -> list[Any]:
    """Every lru_cache: what the collector lists and, since it lists nothing that was frozen, what modules and classes
    name, themselves or behind a decorator.   By type: isinstance may ask one of torch's proxies, which then warns."""
    spaces = [dict(vars(module)) for module in list(sys.modules.values()) if issubclass(type(module), ModuleType)]
    named = [value for space in spaces for value in space.values()]
    named += [value for kind in named if issubclass(type(kind), type) for value in dict(vars(kind)).values()]
    named = [value.__func__ if type(value) in (staticmethod, classmethod) else value for value in named]
    cells = [cell for value in named if type(value) is FunctionType for cell in value.__closure__ or ()]
    inner = [value for cell in cells for value in gc.get_referents(cell)]
    found = [value for value in (*gc.get_objects(), *named, *inner) if type(value) is functools._lru_cache_wrapper]
    return list({id(cache): cache for cache in found}.values())


def _holds(values: Collection[Any], depth: int) -> bool:
    """Whether a tensor without storage is among the values, or in the containers among them."""
    inner = [_values(value) for value in values if depth and isinstance(value, (tuple, list, dict))]
    return any(isinstance(v, FakeTensor) for v in values) or any(_holds(each, depth - 1) for each in inner)


def _storage(t: Tensor) -> int:
    """What tells tensors that share memory."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse one has none
        return id(t)


def _linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of some kind, and nothing around others: a LinearAttention has layers inside."""
    return "Linear" in type(module).__name__ and _out_features(module) is not None and not list(module.children())


def _out_features(layer: nn.Module) -> Any:
    """N; transformers' Conv1D calls it nf."""
    return getattr(layer, "out_features", getattr(layer, "nf", None))


def _trace(model: nn.Module, inputs: dict[str, Any], made: list[weakref.ref[Tensor]]) -> str | None:
    """Run the model once on tensors without storage, uncompiled.   Returns why that failed, and says it alone.

    made: gets the tensors that the run makes.
    """
    told, _TORCHS_LOG.disabled = _TORCHS_LOG.disabled, True
    try:
        with (
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
            Unwritten(),  # arithmetic of a buffer and a number runs on the buffer itself, and so do versions
            _Experts(made),
            torch.compiler.set_stance("force_eager"),
        ):
            # of a tensor with storage, a change in place would not be seen; ids keep theirs: models look at them
            model(**tree_map_only(Tensor, lambda t: mode.from_tensor(t) if t.is_floating_point() else t, inputs))
    except Exception as error:  # a model may do anything with a tensor that has no data
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    finally:
        _TORCHS_LOG.disabled = told
    return None


def _guesses(model: Any, layers: Mapping[str, Any], shape: tuple[int, int]) -> list[dict[str, Any]]:
    model = getattr(model, "module", model)  # DistributedDataParallel's
    first = next(model.parameters(), torch.empty(0))
    ids = torch.zeros(shape, dtype=torch.int64, device=first.device)
    guesses = []
    if not isinstance(getattr(model, "config", {}), dict):  # which PEFT gives a model that has none
        decoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
        mask = {"attention_mask": torch.ones_like(ids)}  # without one, some look for padding in ids that have no data
        guesses = [{"input_ids": ids, **mask, **decoder}, {"input_ids": ids, **decoder}]
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    needed = [
        name
        for name, parameter in inspect.signature(whole.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and parameter.kind is not parameter.VAR_POSITIONAL
    ]
    width = next((layer.in_features for layer in layers.values() if hasattr(layer, "in_features")), 1)
    x = torch.zeros((*shape, width), dtype=first.dtype, device=first.device)
    if needed != ["input_ids"]:  # a tensor each: an argument is no other
        guesses += [{name: t.clone() for name in needed} for t in (x, ids)]
    return guesses


def owner(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, bool]:
    """The module whose forward calls all the named ones: the innermost around them that has a forward.

    And whether they lie in different entries of a list in it: blocks, which may be sharded or recomputed one by one.
    """
    paths = [name.split(".")[:-1] for name in names]
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))
    around = [model]
    for part in paths[0][:shared]:
        around.append(around[-1].get_submodule(part))
    blocks = _formless(around[-1]) and any(len(path) > shared for path in paths)
    return next((module for module in reversed(around) if not _formless(module)), model), blocks


def _formless(module: nn.Module) -> bool:
    """A ModuleList or the like, that is never called."""
    return type(module).forward is nn.Module.forward


def _runs(model: nn.Module, calls: list[Call], together: int) -> Iterable[list[str]]:
    """Maximal runs of calls with one tensor as it was.   A layer called more than once, or with layers of its own now
    and other layers then, stays by itself."""
    often = Counter(call.name for call in calls)
    run: list[Call] = []
    for call in calls:
        alone = often[call.name] > 1
        same = bool(run) and call.x is run[0].x and call.version == run[0].version
        if run and (not same or alone or len(run) == together or owner(model, [run[0].name, call.name])[1]):
            yield [member.name for member in run]
            run = []
        if not alone:
            run.append(call)
    if run:
        yield [member.name for member in run]
