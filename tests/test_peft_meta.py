"""Tensors of the meta device: patched models and LoRALinear give shapes, as PEFT's own layers do."""

from __future__ import annotations

import copy

import pytest
import torch
from models import peft_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear


def shapes(model: nn.Module, length: int) -> list[tuple[torch.Size, torch.dtype]]:
    """Of the logits and of every gradient of a step, and of the logits of an evaluation."""
    model.zero_grad()
    inputs = dict(inputs_embeds=torch.empty(2, length, 64), position_ids=torch.zeros(2, length, dtype=torch.int64))
    inputs = {name: t.to("meta") for name, t in inputs.items()}
    inputs["attention_mask"] = torch.empty(2, 1, length, length, device="meta")
    found: list[Tensor] = [model.train()(**inputs).logits]
    found[0].sum().backward()
    found += [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        found.append(model.eval()(**inputs).logits)
    assert all(t.is_meta for t in found)
    return [(t.shape, t.dtype) for t in found]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("length", [4, 48])
def test_a_patched_model_gives_the_shapes_that_peft_gives(length: int, p: float) -> None:
    model = peft_model(layers=1, lora_dropout=p).to("meta")
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    assert shapes(ours, length) == shapes(model, length)
    mlp = ours.base_model.model.model.layers[0].mlp
    for layer in (mlp, mlp.gate_proj):
        assert "device type 'meta'" in fastlora.explain(layer, torch.empty(512, 4, 64, device="meta")).why


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_layer_gives_shapes(p: float) -> None:
    layer = LoRALinear(16, 24, r=4, lora_dropout=p, device="meta")
    x = torch.empty(3, 5, 16, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.is_meta and y.shape == (3, 5, 24) and x.grad is not None and x.grad.shape == x.shape
    with torch.no_grad():
        assert layer.eval()(x).shape == (3, 5, 24)


@pytest.mark.parametrize("rows", [3, 20_000])
@pytest.mark.parametrize("left", ["weight", "lora_A", "lora_B"])
def test_a_weight_left_on_meta_is_named(left: str, rows: int) -> None:
    """As `low_cpu_mem_usage` leaves what no file filled; torch multiplies a CPU's x with it to what lies in memory."""
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), LoraConfig(r=4, target_modules=["0"]))
    fastlora.patch(model, inputs={"input": torch.zeros(2, 16)})
    layer = model.base_model.model[0]
    part = layer.base_layer if left == "weight" else getattr(layer, left)["default"]
    part.weight = nn.Parameter(part.weight.to("meta"))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{left}: got device meta, wanted cpu, where x is"):
        model(torch.randn(rows, 16))
