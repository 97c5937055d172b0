"""Groups of a patched model: found by structure whatever the model, told in the report, and nothing else changed."""

from __future__ import annotations

import copy
import functools
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from grouping import STRUCTURES, K, Three, found, group_calls, nothing_left, outcome, wrap
from models import VOCABULARY, peft_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora

pytestmark = pytest.mark.usefixtures("groups_alone")


@pytest.mark.parametrize("family", STRUCTURES)
def test_found_by_structure(family: str) -> None:
    build, names, count = STRUCTURES[family]
    model = get_peft_model(build(), LoraConfig(target_modules="all-linear", r=2))
    report = fastlora.patch(model)
    assert report.ungrouped is None
    groups = [" ".join(name.split(".")[-1] for name in group) for group in report.groups]
    if family == "phi":  # its fc1 reads what q, k, v read, in another module's forward
        groups = [name for name in groups if "fc1" not in name]
    assert (set(groups), len(groups)) == (names, count)
    for group in report.groups:
        assert len({name.split("layers.")[-1].split(".")[0] for name in group}) == 1, "a group of two decoder layers"


def test_a_model_of_ones_own() -> None:
    """No config, no known name: the tensor alone decides."""
    assert found(wrap(Three())) == {"this that other"}


def test_a_model_with_a_config_of_its_own_and_ids() -> None:
    class Settings:
        width = K

    class Model(Three):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.words = Settings(), nn.Embedding(VOCABULARY, K)

        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
            return super().forward(self.words(ids))

    assert found(wrap(Model())) == {"this that other"}


def test_arguments_are_not_one_tensor() -> None:
    class Cross(Three):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.this(x) + self.other(context) + self.that(context).sum()

    assert found(wrap(Cross())) == {"other that"}


def test_layers_of_a_list() -> None:
    """Its entries are siblings; what lies in different entries of it is not: blocks are recomputed one by one."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.used = nn.ModuleList(nn.Linear(K, K) for _ in range(3)), 3

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([head(x) for head in self.heads[: self.used]]).sum(0)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"k": nn.Linear(K, K), "v": nn.Linear(K, K)}) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return sum(block["k"](x) + block["v"](x) for block in self.blocks)  # type: ignore[misc,no-any-return]

    model = wrap(Heads())
    assert found(model) == {"0 1 2"} and found(wrap(Blocks())) == {"k v"}
    model.base_model.model.used = 2
    model(torch.randn(2, K))
    assert nothing_left(), "the list is never called, and nobody forgot"


def between(change: Any) -> nn.Module:
    class Model(Three):
        def between(self, x: Tensor) -> Tensor:
            return change(self, x)

    return wrap(Model())


def test_what_lies_between() -> None:
    """Other work does not part siblings; another tensor, a change in place, or a layer called twice does."""
    assert found(between(lambda model, x: (x.exp().sum(), x)[1])) == {"this that other"}
    assert found(between(lambda model, x: x + 1)) == {"that other"}
    assert found(between(lambda model, x: x.add_(1))) == {"that other"}
    assert found(between(lambda model, x: (x.view(-1)[:2].zero_(), x)[1])) == {"that other"}
    assert found(between(lambda model, x: (model.this(x), x)[1])) == {"that other"}


def test_what_cannot_be_traced_says_so_and_runs() -> None:
    model, x = between(lambda model, x: x[: int(x.sum() < 1e9) * len(x)]), torch.randn(2, K)
    expected, report = outcome(model, x), fastlora.patch(model)
    assert report.groups == [] and report.ungrouped is not None and report.ungrouped in str(report)
    assert "patch(model, inputs=" in str(report)
    with group_calls() as calls:
        for name, value in outcome(model, x).items():
            torch.testing.assert_close(value, expected[name])
    assert calls.call_count == 0


def test_torch_is_silent_about_what_cannot_be_traced(caplog: pytest.LogCaptureFixture) -> None:
    """Of what tensors without storage cannot multiply, grouped batches in fp32 before 2.15, it prints tracebacks."""
    x = torch.randn(2, K)
    ends = torch.tensor([1, 2], dtype=torch.int32)
    model = between(lambda model, x: x + torch.nn.functional.grouped_mm(x, torch.ones(2, K, K), offs=ends))
    outcome(model, x)
    assert "RuntimeError" in str(fastlora.patch(model).ungrouped)
    assert [record for record in caplog.records if record.name.startswith("torch")] == []
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_inputs_of_the_users_own() -> None:
    class Pair(Three):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return super().forward(x.flatten(1) @ shift)

    model = wrap(Pair())
    assert fastlora.patch(model).ungrouped is not None
    assert found(model, inputs={"x": torch.randn(2, 3, 5), "shift": torch.randn(15, K)}) == {"this that other"}


def test_patch_leaves_the_model_as_it_was() -> None:
    """Random states, modes, hooks, gradients, and what the model keeps from its first forward."""

    class Model(Three):
        kept: Tensor | None = None

        def between(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = torch.ones(K)
                self.register_buffer("mask", torch.ones(K))
                self.seen.append(x)
            random.random()
            np.random.rand()
            return torch.dropout(x, 0.5, True) * self.kept

    model = Model()
    model.seen = []
    model = wrap(model, lora_dropout=0.5).train()
    model.base_model.model.other.eval()
    called: list[Any] = []
    model.base_model.model.this.register_forward_hook(lambda *_: called.append(1))
    model.base_model.model.that.lora_A.default.weight.grad = torch.ones(4, K)
    modules, before = list(model.modules()), [copy.copy(vars(module)) for module in model.modules()]
    states, drawn = (torch.get_rng_state(), random.getstate()), np.random.RandomState()
    drawn.set_state(np.random.get_state())
    assert found(model) == {"that other"}
    assert np.random.rand() == drawn.rand()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not called and not model.base_model.model.seen and model.base_model.model.kept is None
    assert model.base_model.model.that.lora_A.default.weight.grad.eq(1).all()
    for report in (fastlora.patch(model), fastlora.patch(model)):
        assert report.groups == fastlora.patch(model).groups
    hooks = [key for module in model.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert len(hooks) == 3, "patching again piles up hooks"
    fastlora.unpatch(model)
    assert list(model.modules()) == modules
    for module, attributes in zip(modules, before, strict=True):
        assert vars(module).keys() == attributes.keys() and module.training == attributes["training"]
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert [key for module in model.modules() for key in module._forward_hooks_always_called] == []
    assert len([key for module in model.modules() for key in module._forward_hooks]) == len(called) + 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_patch_draws_nothing_from_generators_of_the_models_own() -> None:
    """The choices that a model makes with one (stochastic depth) are those it would make without patch."""

    class Model(Three):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.deep = random.Random(1), {"legacy": np.random.RandomState(1)}
            self.modern, self.torchs = np.random.default_rng(1), [torch.Generator().manual_seed(1)]

        def draw(self) -> list[float]:
            drawn = torch.rand((), generator=self.torchs[0]), self.modern.random(), self.deep["legacy"].rand()
            return [self.whole.random(), *map(float, drawn)]

        def between(self, x: Tensor) -> Tensor:
            self.whole.random(), self.modern.random(), self.deep["legacy"].rand()
            torch.rand((), generator=self.torchs[0])
            return x

    model = wrap(Model())
    same = copy.deepcopy(model.base_model.model)
    assert found(model) == {"this that other"}
    assert model.base_model.model.draw() == same.draw()


class Stats:
    calls = 0


def counting(x: Tensor, model: Any) -> None:
    """Every way to count the calls."""
    model.cnt += 1
    model.steps.add_(1)
    model.mean[0] += 2
    model.plain.mul_(2)
    torch.add(model.mean, 1, out=model.mean)
    model.total.zero_()
    model.stats.calls += 1
    model.deep["calls"].append(1)


def counts(model: Any) -> list[Any]:
    tensors = model.cnt, model.steps, model.mean, model.plain, model.total
    versions = [t._version for t in tensors]
    return [[t.tolist() for t in tensors], versions, model.stats.calls, len(model.deep["calls"])]


def test_patch_writes_into_no_tensor_and_counts_nothing() -> None:
    """Buffers and other tensors keep values and versions; a later forward counts as ever."""

    class Model(Three):
        def __init__(self) -> None:
            super().__init__()
            for name, value in {"cnt": torch.tensor(3), "steps": torch.tensor([5]), "mean": torch.ones(2)}.items():
                self.register_buffer(name, value)
            self.total = nn.Parameter(torch.ones(2), requires_grad=False)
            self.plain, self.stats, self.deep = torch.ones(2), Stats(), {"calls": [1]}

        def between(self, x: Tensor) -> Tensor:
            counting(x, self)
            return x

    model = wrap(Model())
    inner = model.base_model.model
    tensors, before = [id(t) for t in (inner.cnt, inner.mean, inner.plain)], counts(inner)
    assert found(model) == {"this that other"}
    assert counts(inner) == before and tensors == [id(t) for t in (inner.cnt, inner.mean, inner.plain)]
    model(torch.randn(2, K))
    values, versions, calls, appended = counts(inner)
    assert values == [4, [6], [4.0, 2.0], [2.0, 2.0], [0.0, 0.0]] and (calls, appended) == (1, 2)
    assert all(now > then for now, then in zip(versions, before[1], strict=True))


@functools.lru_cache(maxsize=4)
def positions(rows: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """As transformers' vision models keep theirs, for all models of a class."""
    return {"places": (torch.arange(rows, dtype=dtype)[:, None],)}


def test_patch_leaves_no_tensor_without_storage_in_a_cache_of_all_models() -> None:
    """A model's next forward, and that of a model that was never patched, has numbers."""

    class Model(Three):
        def between(self, x: Tensor) -> Tensor:
            (places,) = positions(len(x), x.dtype)["places"]
            return x.add_(self.this(places.expand(-1, K)))

    positions.cache_clear()
    model, x = wrap(Model()), torch.randn(2, K)
    expected = copy.deepcopy(model)(x.clone())
    positions.cache_clear()
    assert found(model, inputs={"x": x}) == {"that other"}
    assert all(type(model(x.clone())) is Tensor for model in (copy.deepcopy(model), model))
    assert torch.equal(model(x.clone()), expected) and positions.cache_info().hits == 2
    assert found(model, inputs={"x": x}) == {"that other"}
    assert positions.cache_info().hits == 4, "a cache without such tensors stays as it was"


def test_the_report_prints_groups() -> None:
    lines = [line.split() for line in str(fastlora.patch(peft_model("llama"))).splitlines()]
    layer = "base_model.model.model.layers.*"
    assert [f"{layer}.self_attn.q_proj", "×2", "one", "group", "with", "k_proj,", "v_proj"] in lines
    assert [f"{layer}.mlp.gate_proj", "×2", "one", "group", "with", "up_proj"] in lines
