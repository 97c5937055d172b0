"""What a sibling leaves for the others: taken once, by the same tensor in the same state, and gone whatever happens."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from grouping import (
    Changing,
    K,
    Three,
    alias,
    assert_right,
    call_one_alone,
    group_calls,
    in_place,
    nothing_left,
    pair,
    shift,
    tell,
    through_a_view,
    wrap,
)
from models import batch, counted, lora_layers, peft_model, step
from tolerance import assert_same
from torch import Tensor, nn

import fastlora
from fastlora import dispatch, ops

pytestmark = pytest.mark.usefixtures("groups_alone")


def test_one_group_a_forward() -> None:
    models = pair()
    assert assert_right(models) == 1
    with group_calls() as calls, counted() as others:
        models[1](torch.randn(5, K))
    assert calls.call_count == 1 and others == (0, 0)


@pytest.mark.parametrize(
    "change, count", [(shift, 2), (alias, 2), (in_place, 2), (through_a_view, 2), (call_one_alone, 3)]
)
def test_what_changes_between_siblings_is_seen(change: Callable[[Any, Tensor], Any], count: int) -> None:
    """With lora_A frozen, for then PEFT, too, lets x change after it was used."""
    models = pair()
    for model in models:
        for layer in lora_layers(model).values():
            layer.lora_A.requires_grad_(False)
    tell(models, change)
    assert assert_right(models) == count


def rescale(model: Any, x: Tensor) -> None:
    model.other.scaling["default"] *= 2


def change_a_weight(model: Any, x: Tensor) -> None:
    model.that.lora_A.default.weight.add_(0.25)


def give_another_weight(model: Any, x: Tensor) -> None:
    model.that.base_layer.weight.data = model.that.base_layer.weight.data * 2


@pytest.mark.parametrize("change", [rescale, change_a_weight, give_another_weight])
def test_a_sibling_that_has_changed_is_seen(change: Callable[[Any, Tensor], None]) -> None:
    """In values: PEFT, too, refuses a backward through a weight that changed after its use."""
    models, x = pair(), torch.randn(5, K)
    tell(models, change)
    with torch.no_grad():
        expected, actual = models[0](x), models[1](x)
    torch.testing.assert_close(actual, expected)
    assert nothing_left()


@pytest.mark.parametrize("mode, count", [(torch.no_grad, 2), (torch.inference_mode, 0)])
def test_x_changed_in_place_without_gradients(mode: Any, count: int) -> None:
    """An inference tensor has no version: there layers run one by one, and say so."""
    models, x = pair(), torch.randn(5, K)
    tell(models, in_place)
    with mode(), group_calls() as calls:
        torch.testing.assert_close(models[1](x), models[0](x))
        why = fastlora.explain(models[1].base_model.model.this, x * 1).why
    assert calls.call_count == count and ("inference tensor" in why) == (count == 0)


def test_modes_are_part_of_the_key() -> None:
    """In no_grad of the forward's own, as in a reentrant checkpoint, a layer is alone; autocast gives another dtype."""

    class Mixed(Three):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            with torch.no_grad():
                first = self.this(x)
            second = self.that(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
                third = self.other(x)
            assert third.dtype != torch.float32
            return torch.cat((first, second, third.to(second.dtype)), -1)

    model = wrap(Mixed())
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    assert assert_right((model, ours)) == 2
    assert ours.base_model.model.this.lora_A.default.weight.grad is None


def test_an_exception_between_siblings() -> None:
    models = pair()

    def fail(model: Any, x: Tensor) -> None:
        raise KeyError("on purpose")

    tell(models, fail)
    with pytest.raises(KeyError):
        models[1](torch.randn(5, K))
    assert nothing_left()
    tell(models, lambda model, x: None)
    assert assert_right(models) == 1


def test_layers_called_outside_of_their_callers_forward() -> None:
    """From a training_step or an encode(): nobody would tell when what is left for a sibling is out of date."""
    models, x = pair(), torch.randn(5, K)
    expected, actual = [], []
    for model, out in zip(models, (expected, actual), strict=True):
        net = model.base_model.model
        with torch.no_grad(), group_calls() as calls:
            net.this(x)
            net.that.lora_B.default.weight.data.mul_(2)  # an average swapped in: the version stays
            out.append(net.that(x))
        for layer in (net.this, net.other):
            layer(x).sum().backward()
            out.append(layer.lora_A.default.weight.grad)
    for mine, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert calls.call_count == 0 and nothing_left()
    assert "outside of their caller's forward" in fastlora.explain(models[1].base_model.model.this, x).why
    assert assert_right(models) == 1


def test_an_exception_in_a_callers_own_hook() -> None:
    """Before its forward or after: the next call outside is outside."""
    for register in (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook):
        models = pair()
        handle = register(models[1].base_model.model, lambda *_: {}["on purpose"])
        with pytest.raises(KeyError):
            models[1](torch.randn(5, K))
        assert nothing_left()
        handle.remove()
        assert assert_right(models) == 1


def test_a_sibling_never_called() -> None:
    """Its gradient is none, as in PEFT, and what was computed for it is dropped."""

    class Two(Three):
        few = False

        def forward(self, x: Tensor) -> Tensor:
            return self.this(x).sum(-1) + self.that(x).sum(-1) + (0 if self.few else self.other(x).sum(-1))

    model = wrap(Two())
    ours = copy.deepcopy(model)
    assert [len(group) for group in fastlora.patch(ours).groups] == [3]
    model.base_model.model.few = ours.base_model.model.few = True
    assert assert_right((model, ours)) == 1
    assert ours.base_model.model.other.lora_A.default.weight.grad is None


def test_layers_that_drop_some_of_x_each_for_itself_are_no_siblings() -> None:
    """They share x in evaluation alone; in training a group would compute three layers for each of them."""

    class Dropping(Three):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(
                [f(nn.functional.dropout(x, 0.1, self.training)) for f in (self.this, self.that, self.other)], -1
            )

    model = wrap(Dropping())
    assert fastlora.patch(model).groups == []


def test_an_output_that_nobody_used_and_one_changed_in_place() -> None:
    class Careless(Three):
        def forward(self, x: Tensor) -> Tensor:
            x = x[None] * 1
            return self.this(x).relu_().sum(-1) + self.other(x).mul_(2).sum(-1) + 0 * len(self.that(x))

    model = wrap(Careless())
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    assert assert_right((model, ours)) == 1


def test_nothing_stays_alive() -> None:
    models, seen = pair(), []
    tell(models, lambda model, x: seen.append(weakref.ref(x)))
    model = models[1]
    gc.collect()
    gc.disable()
    try:
        y = model(torch.randn(5, K, requires_grad=True))
        seen.append(weakref.ref(y))
        y.sum().backward()
        del y
        with torch.no_grad():
            model(torch.randn(5, K))
        assert [reference() for reference in seen] == [None] * 3
    finally:
        gc.enable()


def test_a_patched_model_is_freed_with_its_last_name() -> None:
    """Siblings know each other without keeping each other: no waiting for the cycle collector."""
    model = peft_model()
    fastlora.patch(model)
    layer = weakref.ref(lora_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"])
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_a_model_that_calls_itself() -> None:
    """In the middle of its siblings, with another tensor and with the same."""
    for again in (lambda x: x + 1, lambda x: x):
        models, depth = pair(), [0]

        def recurse(model: Any, x: Tensor, again: Any = again, depth: list[int] = depth) -> Tensor | None:
            if depth[0]:
                return None
            depth[0] += 1
            inner = model(again(x))
            depth[0] -= 1
            return x + inner[:, :1]

        tell(models, recurse)
        assert_right(models)


def test_two_threads_through_one_model() -> None:
    model = peft_model(layers=1)
    fastlora.patch(model)
    inputs = [batch() for _ in range(4)]
    with torch.no_grad():
        expected = [model(**each).logits for each in inputs]
    wrong: list[Any] = []

    def work(each: dict[str, Tensor], logits: Tensor) -> None:
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(model(**each).logits, logits):
                    wrong.append(each)
        if not nothing_left():
            wrong.append("left")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_between_siblings_takes_nothing_and_drops_nothing() -> None:
    models, other = pair(), torch.randn(5, K)
    first = threading.current_thread()

    def visit(model: Any, x: Tensor) -> None:
        if threading.current_thread() is first:
            thread = threading.Thread(target=model, args=(other.to(x.dtype),))
            thread.start()
            thread.join()

    tell(models, visit)
    assert assert_right(models) == 2  # a group of each thread's


@pytest.mark.parametrize("change", ["eval", "bias", "adapter"])
def test_what_a_sibling_would_run_changes_between(change: str) -> None:
    models = pair(lora_dropout=0.5)

    def between(model: Any, x: Tensor) -> None:
        if change == "eval":
            model.that.eval()
        elif change == "bias":
            model.other.base_layer.bias.data = model.other.base_layer.bias.data + 1
        else:
            model.that.lora_B.default.weight.data = model.that.lora_B.default.weight.data * 2

    for model in models:
        model.base_model.model.this.eval()
        model.base_model.model.other.eval()
    if change != "eval":
        models[0].eval(), models[1].eval()
    tell(models, between)
    assert_right(models)


def test_gradients_add_up_over_micro_batches() -> None:
    models = pair()

    def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        for part in x.to(next(model.parameters()).dtype).split(2):
            model(part).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert assert_right(models, run) == 3


def test_explain_tells_in_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = pair()[1].base_model.model, torch.randn(5, K)
    assert "one group with that, other" in fastlora.explain(layer.this, x).why
    handle = layer.that.register_forward_pre_hook(lambda module, args: None)
    assert "apart from that, other: base_model.model.that has hooks" in fastlora.explain(layer.this, x).why
    handle.remove()
    layer.other.enable_adapters(False)
    assert "adapters are disabled" in fastlora.explain(layer.this, x).why
    layer.other.enable_adapters(True)
    monkeypatch.setattr(ops, "FEW_INPUTS", 2**16)
    assert "few rows" in fastlora.explain(layer.this, x).why


HOOKS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "forward hook": (lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y), 1),
    "pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)), 0),
    "backward hook": (lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)), 0),
    "base_layer": (lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y), 0),
    "lora_A": (lambda layer: layer.lora_A.default.register_forward_hook(lambda module, args, y: 2 * y), 0),
    "accelerate": (lambda layer: add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu")), 0),
}


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_a_sibling(hook: str, after: bool) -> None:
    """They fire as in PEFT, whether they were there when patching or not."""
    add, count = HOOKS[hook]
    model = wrap(Changing())
    ours = copy.deepcopy(model)
    if after:
        fastlora.patch(ours)
    for each in (model, ours):
        add(each.base_model.model.that)
    if not after:
        fastlora.patch(ours)
    assert assert_right((model, ours)) == count


def test_disabled_and_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model(), batch()
    ours = copy.deepcopy(model)
    fastlora.patch(ours, strict=True)
    with group_calls() as calls:
        step(ours, inputs)
        assert calls.call_count == 4
        lora_layers(ours)["base_model.model.model.layers.0.self_attn.k_proj"].merge()
        with pytest.raises(RuntimeError, match=r"k_proj: strict mode forbids.*merged"):
            step(ours, inputs)
    assert nothing_left()
    ours = copy.deepcopy(model)
    monkeypatch.setattr(dispatch.env, "disable", True)
    fastlora.patch(ours)
    with group_calls() as calls:
        for name, value in step(ours, inputs).items():
            assert_same(value, step(model, inputs)[name])
    assert calls.call_count == 0
