"""Groups where the forward is not what runs: in a recomputation, and under a compiler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouping import (
    Changing,
    K,
    Three,
    assert_right,
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
from tolerance import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora

pytestmark = pytest.mark.usefixtures("groups_alone")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, p: float) -> None:
    """The same bits as without, the same masks; groups run again in the recomputation, and nothing is left by it."""
    model, inputs = peft_model(lora_dropout=p).train(), batch()
    fastlora.patch(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    expected = {name: value.clone() for name, value in step(model, inputs).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
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
    """What tanh keeps is recomputed, with a layer whose sibling was called outside of the checkpoint, or in another."""

    class Piecewise(Three):
        def forward(self, x: Tensor) -> Tensor:
            layers, x = {"this": self.this, "that": self.that, "other": self.other}, x * 1
            run = lambda f: checkpoint(lambda x: torch.tanh(f(x)), x, use_reentrant=reentrant)  # noqa: E731
            return torch.cat([run(f) if which in (name, "every") else f(x) for name, f in layers.items()], -1)

    model = wrap(Piecewise())
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    assert_right((model, ours))


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


def test_a_cast_of_the_models_own_is_no_autocast_to_a_compiler() -> None:
    class Cast(Changing):
        def forward(self, x: Tensor) -> Tensor:
            h = x.to(torch.float64)
            first = self.this(h)
            self.what(self, h)
            return torch.cat((first, self.that(h), self.other(h)), -1)

    model = wrap(Cast()).double()
    ours, x = copy.deepcopy(model), torch.randn(5, K)
    assert fastlora.patch(ours, inputs={"x": x}).groups
    tell((model, ours), in_place)
    with torch.no_grad():
        torch.testing.assert_close(graphs_of(ours, x)[1], model(x))


def test_what_nobody_used_has_no_gradient_under_a_compiler() -> None:
    """A zero would be one, and an optimizer with weight decay would move it."""

    class Unused(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.this(x).sum() + self.that(x).sum() + 0 * len(self.other(x))

    model = wrap(Unused())
    fastlora.patch(model)
    graphs_of(model, torch.randn(5, K))[1].backward()
    assert model.base_model.model.this.lora_B.default.weight.grad.any()
    assert model.base_model.model.other.lora_B.default.weight.grad is None


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
    assert "in a compiled checkpoint" in fastlora.explain(inner.this, x).why
