"""Quantised bases run split, on a CPU too: the library's own layer, then our update, which is held to float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from models import base_model, batch, counted, lora_config, lora_layers, step
from peft import LoraConfig, PeftModel, get_peft_model
from tolerance import assert_close, assert_same
from torch import Tensor, nn

import fastlora
from fastlora import peft as ours

BF16 = torch.bfloat16
SPLIT = {"nf4": "bitsandbytes nf4", "int8": "bitsandbytes Int8Params", "torchao": "torchao Int8Tensor"}
CLASS = {"nf4": "FusedLinear4bit", "int8": "FusedLinear8bitLt", "torchao": "FusedTorchaoLoraLinear"}


def bitsandbytes_model(path: Path, **options: object) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    base_model().save_pretrained(path)
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=BF16
    )


def nf4(path: Path) -> nn.Module:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": BF16}
    return bitsandbytes_model(path, load_in_4bit=True, **options)


def int8(path: Path) -> nn.Module:
    return bitsandbytes_model(path, load_in_8bit=True)


def torchao(path: Path) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = base_model().to(BF16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


KINDS = [nf4, int8, torchao]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[[Path], nn.Module]:
    return request.param


def test_they_run_split_and_say_so(kind: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    model = get_peft_model(kind(tmp_path), lora_config())
    keys = list(model.state_dict())
    report = fastlora.patch(model, strict=True)
    assert set(report.patched.values()) == {f"split ({SPLIT[kind.__name__]})"} and len(report.patched) == 14
    assert {type(layer).__name__ for layer in lora_layers(model).values()} == {CLASS[kind.__name__]}
    assert list(model.state_dict()) == keys
    with counted() as calls:
        results = step(model, batch())
    assert calls == (0, 14)
    assert all(value.isfinite().all() for value in results.values()) and len(results) == 2 + 28
    fastlora.unpatch(model)
    assert not any(type(layer).__name__.startswith("Fused") for layer in lora_layers(model).values())


def exact(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The library's own base output and gradient as they are, and the low-rank terms beside them in float64."""
    x = x.detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = layer.base_layer(x)
    factors, update = [], torch.zeros(())
    for name in layer.active_adapters:
        a, b = (getattr(layer, part)[name].weight.detach().double().requires_grad_() for part in ("lora_A", "lora_B"))
        update = update + wide @ a.t() @ b.t() * layer.scaling[name]
        factors += [a, b]
    y.backward(dy.to(y.dtype))
    dwide, *grads = torch.autograd.grad(update, [wide, *factors], dy.double())
    return dict(zip(("y", "dx"), (y.double() + update, x.grad.double() + dwide), strict=True)) | dict(enumerate(grads))


def outcome(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    names = layer.active_adapters
    factors = [getattr(layer, part)[name].weight for name in names for part in ("lora_A", "lora_B")]
    dx, *grads = torch.autograd.grad(y, [x, *factors], dy.to(y.dtype))
    return {"y": y, "dx": dx} | dict(enumerate(grads))


@pytest.mark.parametrize("adapters", [1, 2])
def test_as_near_to_float64_as_peft(kind: Callable[[Path], nn.Module], adapters: int, tmp_path: Path) -> None:
    model = get_peft_model(kind(tmp_path), lora_config(r=8))
    if adapters == 2:
        model.add_adapter("other", lora_config(r=6))
        model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x, dy = torch.randn(260, 64).to(BF16), torch.randn(260, 128).to(BF16)
    plain, truth = outcome(layer, x, dy), exact(layer, x, dy)
    fastlora.patch(model)
    with counted() as calls:
        actual = outcome(layer, x, dy)
    assert calls == (0, adapters)
    assert actual.keys() == plain.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype
        assert_close(value, plain[name], truth[name], str(name))


def test_autocast_keeps_pefts_dtype(kind: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    model = get_peft_model(kind(tmp_path), lora_config()).train()  # in eval, nf4 packs itself for inference alone
    layer, x = model.base_model.model.model.layers[0].mlp.up_proj, torch.randn(5, 64).to(BF16)
    with torch.autocast("cpu", BF16):
        expected = layer(x)
        fastlora.patch(model)
        with counted() as calls:
            actual = layer(x)
    assert calls == (0, 1) and actual.dtype == expected.dtype
    assert_close(actual, expected, exact(layer, x, torch.ones(5, 128))["y"])


def test_registered_layers_are_of_pefts_choice(kind: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    """The registration of nn.Linear does not swallow quantised layers, which are nn.Linear by isinstance."""
    model = get_peft_model(kind(tmp_path), fastlora.register(lora_config()))
    assert {type(layer).__name__ for layer in lora_layers(model).values()} == {CLASS[kind.__name__]}


@pytest.mark.parametrize("make", [nf4, torchao])  # on int8, PEFT's own DoRA fails on a CPU
def test_dora_on_a_quantised_base_is_pefts(make: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    model = get_peft_model(make(tmp_path), lora_config(use_dora=True, target_modules=["q_proj"]))
    expected = step(model, batch_of(1))["logits"]
    report = fastlora.patch(model)
    assert not report.patched and all("DoraLinearVariant" in reason for reason in report.skipped.values())
    assert_same(step(model, batch_of(1))["logits"], expected)


def batch_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return batch()


def test_merging_is_pefts(tmp_path: Path) -> None:
    """A merged 8-bit layer is its base alone, and skipped with that reason."""
    model: PeftModel = get_peft_model(int8(tmp_path), LoraConfig(target_modules=["q_proj"], r=2))
    fastlora.patch(model)
    model.merge_adapter()
    report = fastlora.patch(model)
    assert not report.patched and set(report.skipped.values()) == {"merged: the base alone holds the update"}
    model.unmerge_adapter()
    assert len(fastlora.patch(model).patched) == 2


def test_a_hook_on_a_quantised_base_is_seen(tmp_path: Path) -> None:
    """The split path calls base_layer, hooks and all, so it stays split; hooks inside the adapter do not."""
    model = get_peft_model(int8(tmp_path), LoraConfig(target_modules=["q_proj"], r=2))
    fastlora.patch(model)
    layer, seen = model.base_model.model.model.layers[0].self_attn.q_proj, []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(module))
    with counted() as calls:
        layer(torch.randn(3, 64, dtype=BF16))
    assert calls == (0, 1) and seen == [layer.base_layer]
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: None)
    assert ours.why_not(layer) == "adapter 'default' has hooks in it, or a forward of its own"
