"""What a gated MLP's forward reads beside x and its layers: watched at every call, or the MLP is left alone."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gating import Mine, gated_calls, mine
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.peft.structure import find

LIMITS: dict[str, Any] = {"z": None}
GET = LIMITS.get
LIMIT: float | None = None


pytestmark = pytest.mark.usefixtures("however_few")


class Clipped(Mine):
    """Its product is clipped to what `limit` reads, if that is anything."""

    def limit(self) -> Any:
        return None

    def forward(self, hidden: Tensor, unused: Any = None) -> Tensor:
        z, limit = self.act(self.one(hidden)) * self.two(hidden), self.limit()
        return self.three(z if limit is None else z.clamp(-limit, limit))


class Attribute(Clipped):
    most: float | None = None

    def limit(self) -> Any:
        return self.most


class OfTheClass(Clipped):
    most: float | None = None

    def limit(self) -> Any:
        return type(self).most


class Private(Clipped):
    _most: float | None = None

    def limit(self) -> Any:
        return self._most


class Config(Clipped):
    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.config = SimpleNamespace(most=None, deep={"most": None})

    def limit(self) -> Any:
        return self.config.most


class Options(Clipped):
    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.options: dict[str, Any] = {"most": None}
        self.pair: tuple[Any, int] = (None, 1)

    def limit(self) -> Any:
        return self.options.get("most")


class Pair(Options):
    def limit(self) -> Any:
        return self.pair[0]


class Heir(Clipped):
    """Through super() it reads what its class's own code does not name."""

    def forward(self, hidden: Tensor, unused: Any = None) -> Tensor:
        return super().forward(hidden)


class Copied(Clipped):
    """With a class of its own to change."""


def patched(kind: type[Mine]) -> Any:
    model = mine(nn.SiLU())
    model.base_model.model.mlp.__class__ = kind
    for name, value in vars(kind() if kind in (Config, Options, Pair) else nn.Module()).items():
        model.base_model.model.mlp.__dict__.setdefault(name, value)
    return model


CHANGES: dict[str, tuple[type[Mine], Callable[[Any], Any], str]] = {
    "attribute": (Attribute, lambda mlp: setattr(mlp, "most", 0.01), "most"),
    "class attribute": (OfTheClass, lambda mlp: setattr(OfTheClass, "most", 0.01), "most"),
    "private attribute": (Private, lambda mlp: setattr(mlp, "_most", 0.01), "_most"),
    "config": (Config, lambda mlp: setattr(mlp.config, "most", 0.01), "config.most"),
    "another config": (Config, lambda mlp: setattr(mlp, "config", SimpleNamespace(most=0.01)), "config.most"),
    "dict": (Options, lambda mlp: mlp.options.update(most=0.01), "options"),
    "tuple": (Pair, lambda mlp: setattr(mlp, "pair", (0.01, 1)), "pair"),
    "method": (Copied, lambda mlp: setattr(Copied, "limit", lambda self: 0.01), "Copied.limit"),
    "method of a base": (Copied, lambda mlp: setattr(Clipped, "limit", lambda self: 0.01), "Copied.limit"),
    "code": (Copied, lambda mlp: setattr(Clipped.limit, "__code__", (lambda self: 0.01).__code__), "Copied.limit"),
}


@pytest.fixture
def _as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in ((OfTheClass, "most"), (Clipped, "limit"), (Clipped, "forward")):
        monkeypatch.setattr(kind, name, vars(kind)[name])
    monkeypatch.setattr(Copied, "limit", Clipped.limit, raising=False)
    monkeypatch.delattr(Copied, "limit")
    monkeypatch.setattr(Clipped.limit, "__code__", Clipped.limit.__code__)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("_as_they_were")
def test_a_later_change_of_what_the_forward_reads(name: str) -> None:
    """Until then one op; from then on its own forward, as unpatched."""
    kind, change, told = CHANGES[name]
    ours, x = patched(kind), torch.randn(3, 12, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    assert fastlora.patch(ours).gated
    mlp = ours.base_model.model.mlp
    with gated_calls() as calls:
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10)
        assert calls.call_count == 1
        change(mlp)
        if "class" not in name and "method" not in name and name != "code":
            change(theirs.base_model.model.mlp)
        assert mlp.limit() == 0.01
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10)
        assert calls.call_count == 1
    assert f"{told} was changed since it was patched" in fastlora.explain(mlp, x).why


@pytest.mark.usefixtures("_as_they_were")
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, "pickled"])
def test_a_forward_that_is_replaced_on_the_class(through: Any) -> None:
    """As kernel libraries do to models of a family: the new one runs, in copies too, and in those yet to be loaded."""
    model, x = patched(Clipped), torch.randn(3, 12, dtype=torch.float64)
    fastlora.patch(model)
    mlp = model.base_model.model.mlp
    data = pickle.dumps(mlp)
    ours = None if through == "pickled" else through(mlp)
    with gated_calls() as calls:
        pickle.loads(data)(x)
        assert calls.call_count == 1
        Clipped.forward = lambda self, hidden: 0 * hidden  # type: ignore[method-assign, assignment]
        ours = ours or pickle.loads(data)
        assert not ours(x).any() and calls.call_count == 1
    assert "Clipped.forward was changed since it was patched" in fastlora.explain(ours, x).why


def test_an_activation_whose_class_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mine(), torch.randn(3, 12, dtype=torch.float64)
    fastlora.patch(model)
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, g: 0 * g)
    with gated_calls() as calls:
        model(x)
        assert calls.call_count == 0


def limited(limit: Callable[[Any], Any]) -> Mine:
    kind: Any = type("Limited", (Options,), {"limit": limit, "of_a_property": property(lambda self: None)})
    module = kind()
    module.register_buffer("most", torch.tensor(0.01))
    module.config = Config().config
    module.parts = [nn.SiLU()]
    return module


def of_the_cell() -> Callable[[Any], Any]:
    most = None
    return lambda self: most


def importing(self: Any) -> Any:
    from test_peft_gated_reads import LIMIT

    return LIMIT


class Namespace:
    most = None


UNWATCHED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "buffer": (lambda self: self.most and None, "looks at a tensor|reads most"),
    "buffer in a branch": (lambda self: self.most if self.options["most"] else None, "reads most"),
    "number outside": (lambda self: LIMIT, "reads LIMIT, a NoneType outside of it"),
    "number outside, inside a function": (lambda self: (lambda: LIMIT)(), "reads LIMIT"),
    "number outside, in a decorated function": (torch.no_grad()(lambda self: LIMIT), "reads LIMIT"),
    "function of a dict outside": (lambda self: GET("z"), "reads GET"),
    "dict outside": (lambda self: LIMITS["z"], "reads LIMITS, a dict outside of it"),
    "class as a namespace": (lambda self: Namespace.most, "reads Namespace.most"),
    "closure": (of_the_cell(), "reads most"),
    "import": (importing, "imports something"),
    "environment": (lambda self: os.environ.get("LIMIT"), "reads os.environ"),
    "grad mode": (lambda self: None if torch.is_grad_enabled() else 0.01, "uses is_grad_enabled"),
    "property": (lambda self: self.of_a_property, "reads of_a_property, a property of its class"),
    "by name": (lambda self: getattr(self, "yet_to_come", None), "uses getattr"),
    "nested": (lambda self: self.config.deep["most"], "reads config.deep, a dict that cannot be watched"),
    "list of modules": (lambda self: self.parts and None, "reads parts, a list that cannot be watched"),
}


@pytest.mark.parametrize("name", UNWATCHED)
def test_what_cannot_be_watched_is_left(name: str) -> None:
    limit, reason = UNWATCHED[name]
    structure = find(limited(limit))
    assert isinstance(structure, str) and any(part in structure for part in reason.split("|"))


def test_an_activation_that_is_called_in_a_way_of_its_own() -> None:
    class Called(nn.SiLU):
        scale = [1.0]  # noqa: RUF012

        def __call__(self, g: Tensor) -> Tensor:
            return super().__call__(g) * self.scale[0]

    assert find(Mine(Called())) == "its Called has a __call__ of its own"


def test_a_change_after_compilation() -> None:
    """The compiler guards on what is watched."""
    model, x = patched(Config), torch.randn(3, 12, dtype=torch.float64)
    assert fastlora.patch(model).gated
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    assert torch.allclose(before, model(x))
    model.base_model.model.mlp.config.most = 0.01
    assert torch.allclose(compiled(x), model(x)) and not torch.allclose(before, model(x))


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, hidden: function(self, hidden)


def test_another_function_of_the_same_code() -> None:
    """A wrapper's, around another."""
    wrapped: Any = type("Wrapped", (Mine,), {"forward": twice(Mine.forward)})
    structure, module = find(wrapped()), wrapped()
    assert structure is not None and not isinstance(structure, str)
    assert structure.reads.changed(module) is None
    wrapped.forward = twice(lambda self, hidden: 0 * hidden)
    assert structure.reads.changed(module) == "Wrapped.forward"


def test_a_forward_of_a_base_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, module = find(Heir()), Heir()
    assert structure is not None and not isinstance(structure, str)
    assert structure.reads.changed(module) is None
    monkeypatch.setattr(Clipped, "forward", lambda self, hidden: 0 * hidden)
    assert structure.reads.changed(module) == "Clipped.forward"


def test_a_number_that_becomes_a_tensor() -> None:
    class Number(Attribute):
        def limit(self) -> Any:
            return None if self.most == 1.0 else self.most

    module = Number()
    module.most = 1.0
    structure = find(module)
    assert structure is not None and not isinstance(structure, str)
    assert structure.reads.changed(module) is None
    module.most = torch.full((20,), 0.01)  # type: ignore[assignment]
    assert structure.reads.changed(module) == "most"


def test_an_activation_that_is_a_method_of_another_object() -> None:
    class Scaled:
        scale = 1.0

        def silu(self, g: Tensor) -> Tensor:
            return F.silu(g) if self.scale == 1 else self.scale * F.silu(g)

    assert find(Mine(Scaled().silu)) == "its forward reads act, a method of another object"


class OldLlama(Options):
    """As transformers' own once was: another way through for a setting that a config holds."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(pretraining_tp=1, hidden_act="silu")
        self.intermediate_size = 20

    def forward(self, hidden: Tensor, unused: Any = None) -> Tensor:
        if self.config.pretraining_tp > 1:
            size = self.intermediate_size // self.config.pretraining_tp
            rows = self.one.weight.split(size, dim=0)
            hidden = torch.cat([F.linear(hidden, rows[i]) for i in range(self.config.pretraining_tp)], dim=-1)
        return self.three(self.act(self.one(hidden)) * self.two(hidden))


def test_what_is_not_read_is_not_looked_at() -> None:
    structure = find(OldLlama())
    assert structure is not None and not isinstance(structure, str)
    assert dict(structure.reads.values) == {
        ("", "config", "pretraining_tp"): 1,
        ("", "intermediate_size", ""): 20,
        ("act", "inplace", ""): False,
    }
