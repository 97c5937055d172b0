"""Patched Hugging Face models against PEFT's own: outputs, gradients, keys, files, checkpointing, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, assert_parity, base_model, batch, counted, lora_config, lora_layers, peft_model, step
from peft import PeftModel, get_peft_model
from tolerance import assert_same
from torch import Tensor, nn

import fastlora
from fastlora import dispatch

BF16 = torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family: str) -> None:
    assert_parity(lambda: peft_model(family), step, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_runs_fused(family: str) -> None:
    """Counted, not assumed: one lora_linear for each LoRA layer of one forward."""
    model = peft_model(family)
    report = fastlora.patch(model, strict=True)
    assert set(report.patched) == set(lora_layers(model)) and set(report.patched.values()) == {"fused"}
    with counted() as calls:
        step(model, batch(family))
    assert calls == (len(report.patched), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_base_with_fp32_adapters(family: str) -> None:
    assert_parity(lambda: get_peft_model(base_model(family).to(BF16), lora_config(family)), step, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        exact = next(model.parameters()).dtype == torch.float64
        with torch.autocast("cpu", BF16, enabled=not exact):
            return step(model, inputs)

    assert_parity(lambda: peft_model(family), run, family)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 5}},
        {"lora_bias": True},
        {"bias": "lora_only", "modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_lora_options(options: dict[str, Any]) -> None:
    assert_parity(lambda: peft_model("llama", **options), step)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_files_are_pefts(family: str, tmp_path: Path) -> None:
    """Patching changes no state-dict key or value; a saved adapter loads in plain PEFT and gives the same numbers."""
    torch.manual_seed(1)
    model = peft_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastlora.patch(model)
    after = model.state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert_same(after[name], value)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path, is_trainable=True)
    assert not any("Fused" in type(layer).__name__ for layer in lora_layers(loaded).values())
    for name, value in loaded.state_dict().items():
        assert_same(value, before[name])
    fastlora.patch(loaded)
    inputs = batch(family)
    for name, value in step(loaded, inputs).items():
        assert_same(value, step(model, inputs)[name])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """With dropout on, the recomputed forward draws the same masks: the same bits as without checkpointing."""
    model, inputs = peft_model(family, lora_dropout=0.3).train(), batch(family)
    fastlora.patch(model)
    model.enable_input_require_grads()
    torch.manual_seed(3)
    expected = {name: value.clone() for name, value in step(model, inputs).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    torch.manual_seed(3)
    with counted() as calls:
        actual = step(model, inputs)
    assert calls.linear.call_count > len(lora_layers(model)), "nothing was recomputed"
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_same(value, expected[name])
    torch.manual_seed(4)
    other = step(model, inputs)
    assert not torch.equal(other["loss"], actual["loss"]), "another seed drew the same masks"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_t5(reentrant: bool) -> None:
    """T5 takes another attention kernel under checkpointing, in PEFT too, so its bits cannot stay: its values do."""

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model.train().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return step(model, inputs)

    assert_parity(lambda: peft_model("t5"), run, "t5")


class Graphs(list[torch.fx.Graph]):
    """A torch.compile backend that keeps the graphs it is given and runs them as they are."""

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.append(module.graph)
        return module.forward

    def calls(self, op: str) -> int:
        return sum(op in str(node.target) for graph in self for node in graph.nodes)


def compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Graphs:
    """The graphs of a forward under torch.compile(fullgraph=True), which no graph break survives."""
    torch.compiler.reset()
    graphs = Graphs()
    loss = torch.compile(model, fullgraph=True, backend=graphs)(**inputs).loss
    if loss.requires_grad:
        loss.backward()
    return graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_to_one_graph(family: str) -> None:
    """The whole training forward is one graph, with one lora_linear for each LoRA layer in it."""
    model = peft_model(family, layers=1, lora_dropout=0.1).train()
    fastlora.patch(model)
    graphs = compiled(model, batch(family))
    assert len(graphs) == 1 and graphs.calls("fastlora.lora_linear") == len(lora_layers(model))


def test_several_adapters_compile_to_one_graph() -> None:
    model = peft_model("llama", layers=1, target_modules=["q_proj"])
    model.add_adapter("other", lora_config("llama"))
    model.base_model.set_adapter(["default", "other"])
    fastlora.patch(model)
    graphs = compiled(model, batch())
    assert len(graphs) == 1
    assert (graphs.calls("fastlora.lora_update"), graphs.calls("fastlora.lora_linear")) == (2, 6)


def test_what_falls_back_compiles_as_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word about a fallback is left out of a graph that it would break."""
    monkeypatch.setattr(dispatch, "_told", set())
    model = peft_model("llama", layers=1)
    fastlora.patch(model)
    model.merge_adapter()
    graphs = compiled(model, batch())
    assert len(graphs) == 1 and graphs.calls("fastlora") == 0


def test_generation_gives_the_same_tokens() -> None:
    model, prompt = peft_model("llama"), batch()["input_ids"]
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    with counted() as calls:
        tokens = ours.generate(input_ids=prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert calls == (4 * len(lora_layers(model)), 0)
    assert_same(tokens, model.generate(input_ids=prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False))
