"""Patching a model and taking it back: strict, disabled, twice, its report, what it refuses, and copies."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from models import base_model, batch, copies, counted, logits, lora_layers, peft_model, step, through_torch_save
from peft import get_peft_model
from peft.tuners import lora
from tolerance import assert_same
from torch import nn

import fastlora
from fastlora import dispatch
from fastlora.peft import FusedLinear, path_of

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())


def test_strict_raises_before_anything_is_changed() -> None:
    model = peft_model("llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(RuntimeError, match=r"embed_tokens: PEFT's Embedding is not"):
        fastlora.patch(model, strict=True)
    assert not any(type(layer) is FusedLinear for layer in lora_layers(model).values())


def test_strict_raises_at_a_later_fallback() -> None:
    model, inputs = peft_model().eval(), batch()
    fastlora.patch(model, strict=True)
    logits(model, inputs)
    mixed = copy.deepcopy(model)  # PEFT leaves its hooks behind when a mixed batch raises
    with pytest.raises(RuntimeError, match=r"q_proj: strict mode forbids.*mixed batch"):
        logits(mixed, inputs, adapter_names=["default"] * 3)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"strict mode forbids.*merged"):
        logits(model, inputs)
    with model.disable_adapter():
        logits(model, inputs)
    fastlora.patch(model, strict=False)
    model.merge_adapter()
    logits(model, inputs)


def test_strict_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    monkeypatch.setattr(dispatch.env, "strict", True)
    logits(model, inputs)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="strict mode forbids"):
        logits(model, inputs)


def embedded() -> nn.Module:
    """Adapters on layers that never get a forward of ours, and on one that does."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.out = nn.Embedding(8, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.mix(self.words(ids).mT).mT)

    return get_peft_model(Model(), peft.LoraConfig(target_modules=["words", "mix", "out"], r=2))


def test_strict_from_outside_is_patchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose class stays PEFT's have no call that could raise: patch does, before anything is changed."""
    monkeypatch.setattr(dispatch.env, "strict", True)
    model = embedded()
    with pytest.raises(RuntimeError, match=r"FASTLORA_STRICT=1, and(.|\n)*words: PEFT's Emb(.|\n)*mix: PEFT's Conv1d"):
        fastlora.patch(model)
    assert not any(type(layer) is FusedLinear for layer in lora_layers(model).values())


def test_layers_that_stay_pefts_are_told_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = embedded()
    with caplog.at_level(logging.WARNING, "fastlora"):
        report = fastlora.patch(model)
        fastlora.patch(model)
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert len(report.skipped) == len(caplog.messages) == 2
    for (name, reason), message in zip(report.skipped.items(), caplog.messages, strict=True):
        assert message.startswith(f"{name} falls back") and reason in message


@pytest.fixture
def disabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch.env, "disable", True)
    yield


def test_disabled_from_outside(disabled: None, caplog: pytest.LogCaptureFixture) -> None:
    """FASTLORA_DISABLE=1: PEFT's forward, silently, under strict too."""
    model, inputs = peft_model(), batch()
    ours = copy.deepcopy(model)
    report = fastlora.patch(ours, strict=True)
    assert not report.patched and set(report.skipped.values()) == {"FASTLORA_DISABLE=1"}
    assert path_of(ours.get_submodule(Q)) == ("peft", "FASTLORA_DISABLE=1")
    with counted() as calls, caplog.at_level(logging.WARNING, "fastlora"):
        expected = step(model, inputs)
        for name, value in step(ours, inputs).items():
            assert_same(value, expected[name])
    assert calls == (0, 0) and not caplog.records


def test_patching_twice_changes_nothing_more() -> None:
    model = peft_model()
    first = fastlora.patch(model)
    kinds = [type(layer) for layer in lora_layers(model).values()]
    second = fastlora.patch(model)
    assert first == second and kinds == [type(layer) for layer in lora_layers(model).values()]


def test_unpatch_restores_everything() -> None:
    model, inputs = peft_model("llama", target_modules=["q_proj", "embed_tokens"]), batch()
    before = {name: (type(layer), set(vars(layer))) for name, layer in lora_layers(model).items()}
    expected = logits(model, inputs)
    fastlora.patch(model)
    fastlora.unpatch(model)
    fastlora.unpatch(model)
    assert before == {name: (type(layer), set(vars(layer))) for name, layer in lora_layers(model).items()}
    assert_same(logits(model, inputs), expected)


def test_the_report_is_a_table() -> None:
    model = peft_model("llama", target_modules=["q_proj", "v_proj", "embed_tokens"])
    lines = str(fastlora.patch(model)).splitlines()
    assert lines[0] == "fastlora runs 4 of 5 LoRA layers"
    assert lines[1].split() == ["base_model.model.model.layers.*.self_attn.q_proj", "×2", "fused"]
    assert "embed_tokens" in lines[3] and "PEFT's forward: PEFT's Embedding" in lines[3]
    assert len({line.index("×") for line in lines[1:]}) == 1, "the columns are not aligned"


@pytest.mark.parametrize("call", [fastlora.patch, fastlora.unpatch])
def test_what_cannot_be_patched_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="model: got dict"):
        call({})
    with pytest.raises(ValueError, match="has no LoRA layer"):
        call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no LoRA layer"):
        call(get_peft_model(base_model(), peft.LoHaConfig(target_modules=["q_proj"])))


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_patched_too(through: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = peft_model("llama"), batch()
    fastlora.patch(model, strict=True)
    other = through(model)
    with counted() as calls:
        assert_same(logits(other, inputs), logits(model, inputs))
    assert calls == (28, 0)
    other.merge_adapter()
    with pytest.raises(RuntimeError, match="strict"):
        logits(other, inputs)
    fastlora.unpatch(other)
    assert all(type(layer) is lora.Linear for layer in lora_layers(other).values())


def test_xlora_still_knows_its_layers() -> None:
    """XLoRA looks for lora.Linear with isinstance, PEFT's all-linear for Linear in the class's name."""
    model = peft_model()
    fastlora.patch(model)
    assert all(
        isinstance(layer, lora.Linear) and "Linear" in type(layer).__name__ for layer in lora_layers(model).values()
    )


def test_t5_reads_the_dtype_of_a_patched_layer() -> None:
    ours, _ = copies(peft_model("t5").to(torch.bfloat16))
    out = logits(ours, batch("t5"))
    assert out.dtype == torch.bfloat16


def test_a_forward_that_somebody_kept_outlives_unpatch() -> None:
    """accelerate and hand-written checkpoints put a function around the bound method, which is ours."""
    model, inputs = peft_model(), batch()
    expected = logits(copy.deepcopy(model), inputs)
    fastlora.patch(model)
    block = model.base_model.model.model.layers[0]
    for module in (block.mlp, block.self_attn.q_proj, block.mlp.up_proj):
        module.forward = functools.partial(module.forward)
    fastlora.unpatch(model)
    assert_same(logits(model, inputs), expected)
