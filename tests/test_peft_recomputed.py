"""Groups where the forward is not what runs: in a recomputation, and under a compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouping import (
    K,
    Three,
    group_calls,
    in_place,
    nothing_left,
    outcome,
    pair,
    shift,
    tell,
    through_a_view,
    wrap,
)
from models import batch, peft_model, step
from test_peft_parity import Graphs
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import ops
from fastlora.peft import gated


@pytest.fixture(autouse=True)
def _grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "FEW_INPUTS", 0)
    monkeypatch.setattr(gated._Gated, "fastlora_gated", False)  # MLPs as one have tests of their own


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, p: float) -> None:
    """The same bits as without, the same masks; groups run again in the recomputation, and nothing is left by it."""
    model, inputs = peft_model(lora_dropout=p).train(), batch()
    fastlora.patch(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    expected = {name: value.clone() for name, value in step(model, inputs).items()}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert fastlora.patch(model).groups, "not found while checkpointing is on"
    torch.manual_seed(3)
    with group_calls() as calls:
        actual = step(model, inputs)
    assert calls.call_count == 8 and nothing_left()
    for name, value in actual.items():
        assert_same(value, expected[name])


def test_a_recomputation_that_stops_between_siblings() -> None:
    """All that backward needs is there after the first sibling: the rest of the forward does not come again."""
    models = pair()
    early, stopped = models[1].base_model.model, []
    tell(models, lambda model, x: stopped.append(1))
    x = torch.randn(5, K, requires_grad=True)
    y = checkpoint(lambda x: early(x), x, use_reentrant=False)
    y.sum().backward()
    assert len(stopped) in (1, 2) and nothing_left()
    assert early.other.lora_A.default.weight.grad is not None


@pytest.mark.parametrize("which", ["this", "that", "every"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_single_siblings(which: str, reentrant: bool) -> None:
    class Piecewise(Three):
        def forward(self, x: Tensor) -> Tensor:
            layers, x = {"this": self.this, "that": self.that, "other": self.other}, x * 1
            run = lambda layer: checkpoint(layer, x, use_reentrant=reentrant)  # noqa: E731
            return torch.cat([run(f) if which in (name, "every") else f(x) for name, f in layers.items()], -1)

    model = wrap(Piecewise())
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    assert_right_or_left((model, ours))


def assert_right_or_left(models: tuple[Any, Any]) -> None:
    """As `assert_right`, where what a lone recomputation leaves may wait for the next group."""
    model, ours = models
    exact, draws = copy.deepcopy(model).double(), []
    for _ in range(6):
        x = torch.randn(5, K)
        actual = {name: value.clone() for name, value in outcome(ours, x).items()}
        draws.append((actual, {name: v.clone() for name, v in outcome(model, x).items()}, outcome(exact, x)))
    assert_all_close(draws)
    ours(torch.randn(5, K))
    assert nothing_left()


def graphs_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Graphs, Any]:
    torch.compiler.reset()
    graphs = Graphs()
    return graphs, torch.compile(model, fullgraph=True, backend=graphs)(*args, **kwargs)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiled_into_one_graph_with_its_groups(p: float) -> None:
    model, inputs = peft_model(layers=1, lora_dropout=p).train(), batch()
    fastlora.patch(model)
    torch.manual_seed(2)
    expected = {name: value.clone() for name, value in step(model, inputs).items()}
    torch.manual_seed(2)
    graphs, out = graphs_of(model, **inputs)
    model.zero_grad()
    out.loss.backward()
    assert len(graphs) == 1 and graphs.calls("fastlora.lora_group") == 2 and graphs.calls("fastlora.lora_linear") == 2
    assert nothing_left()
    torch.testing.assert_close(out.logits, expected["logits"])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", [shift, in_place, through_a_view])
def test_what_changes_between_siblings_is_seen_by_a_compiler(
    change: Callable[[Any, Tensor], Any], autocast: bool
) -> None:
    models, x = pair(), torch.randn(5, K)
    tell(models, change)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = models[0](x)
        graphs, actual = graphs_of(models[1], x)
    torch.testing.assert_close(actual, expected, **({"rtol": 0.05, "atol": 0.05} if autocast else {}))
    assert graphs.calls("fastlora.lora_group") == 2 and nothing_left()


def test_a_graph_break_between_siblings() -> None:
    """What a graph left for the next is used only where it may be, and does not stay."""
    for change in (lambda model, x: None, in_place):
        models = pair()

        def broken(model: Any, x: Tensor, change: Any = change) -> Any:
            torch._dynamo.graph_break()
            return change(model, x)

        tell(models, broken)
        x = torch.randn(5, K)
        torch.compiler.reset()
        actual = torch.compile(models[1], backend="aot_eager")(x)
        torch.testing.assert_close(actual, models[0](x))
        assert nothing_left()


def test_a_compiled_checkpoint_runs_one_by_one() -> None:
    models, x = pair(), torch.randn(5, K)
    inner = models[1].base_model.model

    def run(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch.compiler.reset()
    with torch.no_grad():
        expected = models[0](x)
    expected_grads = outcome(models[0], x)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with group_calls() as calls:
        y = compiled(x.clone().requires_grad_())
    torch.testing.assert_close(y, expected)
    assert calls.call_count == 0 and nothing_left()
    y.square().sum().backward()
    for name, parameter in models[1].named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected_grads[name])
    assert "one by one in a compiled checkpoint" in fastlora.explain(inner.this, x).why
