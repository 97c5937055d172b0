"""The life of adapters on a patched model: added, switched, disabled, merged, mixed, swapped, weighted, deleted."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    FAMILIES,
    TARGETS,
    assert_parity,
    base_model,
    batch,
    copies,
    counted,
    logits,
    lora_config,
    lora_layers,
    peft_model,
    step,
)
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.peft import FusedLinear


def two_adapters(family: str = "llama", **options: Any) -> PeftModel:
    """ "default" and "other", of ranks 4 and 6 unless given; "default" is active."""
    model = peft_model(family)
    model.add_adapter("other", lora_config(family, **{"r": 6, "lora_alpha": 5, **options}))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_set_adapter(family: str) -> None:
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        results = {}
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            results |= {f"{adapter} {name}": value for name, value in step(model, inputs).items()}
        return results

    assert_parity(lambda: two_adapters(family), run, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_active_adapters(family: str) -> None:
    def build() -> PeftModel:
        model = two_adapters(family)
        model.base_model.set_adapter(["default", "other"])
        return model

    assert_parity(build, step, family)
    model = build()
    report = fastlora.patch(model)
    assert set(report.patched.values()) == {"split (2 active adapters)"}
    with counted() as calls:
        step(model, batch(family))
    assert calls == (0, 2 * len(report.patched))


def test_an_adapter_that_some_layers_lack() -> None:
    """A layer without the active adapter is its base; one with it is fused."""
    model, inputs = two_adapters(target_modules=["q_proj"]), batch()
    model.set_adapter("other")
    ours, _ = copies(model)
    report = fastlora.patch(ours)
    assert set(report.patched.values()) == {"fused", "base (no active adapter here)"}
    with counted() as calls:
        logits(ours, inputs)
    assert calls == (2, 0)
    assert_parity(lambda: copy.deepcopy(model), step)


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_adapter(family: str) -> None:
    model, inputs = peft_model(family), batch(family)
    ours, _ = copies(model)
    with counted() as calls:
        with ours.disable_adapter():
            disabled = logits(ours, inputs)
        assert calls == (0, 0)
        enabled = logits(ours, inputs)
        assert calls == (len(lora_layers(model)), 0)
    with model.disable_adapter():
        assert_same(disabled, logits(model, inputs))
    assert not torch.equal(disabled, enabled)


def test_disabling_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    model = peft_model()
    fastlora.patch(model, strict=True)
    with model.disable_adapter(), caplog.at_level(logging.WARNING, "fastlora"):
        logits(model, batch())
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(family: str, safe: bool) -> None:
    """Merged, a layer is PEFT's to the bit, and says so; unmerged, it is fused again."""
    model, inputs = peft_model(family, lora_bias=family == "gpt2"), batch(family)
    ours, _ = copies(model)
    for either in (model, ours):
        either.merge_adapter(safe_merge=safe)
    report = fastlora.patch(ours)
    assert not report.patched and {reason.split(":")[0] for reason in report.skipped.values()} == {"merged"}
    with counted() as calls:
        assert_same(logits(ours, inputs), logits(model, inputs))
        assert calls == (0, 0)
        for either in (model, ours):
            either.unmerge_adapter()
        for name, value in ours.state_dict().items():
            assert_same(value, model.state_dict()[name])
        logits(ours, inputs)
        assert calls == (len(report.skipped), 0)


def test_disabling_a_merged_model_unmerges_it() -> None:
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    model.merge_adapter()
    with model.disable_adapter():
        logits(model, inputs)
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload(family: str) -> None:
    model, inputs = peft_model(family), batch(family)
    ours, _ = copies(model)
    before = logits(ours, inputs)
    plain, merged = model.merge_and_unload(), ours.merge_and_unload()
    assert not lora_layers(merged)
    for name, value in merged.state_dict().items():
        assert_same(value, plain.state_dict()[name])
    assert_same(logits(merged, inputs), logits(plain, inputs))
    assert_same(logits(merged, inputs).argmax(-1), before.argmax(-1))


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_add_weighted_adapter(how: str) -> None:
    def build() -> PeftModel:
        return two_adapters(r=4)

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "mean", combination_type=how)
        model.set_adapter("mean")
        return {"logits": logits(model, inputs)}

    assert_parity(build, run, draws=8)
    model = build()
    fastlora.patch(model)
    with counted() as calls:
        run(model, batch())
    assert calls == (len(lora_layers(model)), 0)


def test_delete_adapter() -> None:
    model, inputs = two_adapters(), batch()
    fastlora.patch(model)
    model.set_adapter("other")
    expected = logits(model, inputs)
    model.delete_adapter("default")
    assert_same(logits(model, inputs), expected)
    assert set(lora_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].lora_A) == {"other"}


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of several adapters run PEFT's own forward, and say so."""
    model, inputs = two_adapters(family).eval(), batch(family)
    ours, _ = copies(model)
    names = ["default", "__base__", "other"]
    with counted() as calls:
        assert_same(logits(ours, inputs, adapter_names=names), logits(model, inputs, adapter_names=names))
        assert calls == (0, 0)
        logits(ours, inputs)
        assert calls == (len(lora_layers(model)), 0)


def test_a_mistyped_name_in_a_mixed_batch_raises() -> None:
    model = two_adapters().eval()
    fastlora.patch(model)
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, batch(), adapter_names=["default", "othre", "other"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, batch(), adapter_names=["default"])


def saved(path: Path, **options: Any) -> Path:
    peft_model("llama", **options).save_pretrained(path)
    return path


@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap(prepared: bool, tmp_path: Path) -> None:
    """Another adapter's weights, rank and scaling in place of the first's; prepared, padded, scalings in tensors."""
    path = saved(tmp_path, r=8 if prepared else 4, lora_alpha=3)

    def build() -> PeftModel:
        model = peft_model("llama", r=4)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        return model

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        before = step(model, inputs)
        hotswap_adapter(model, str(path), "default", torch_device="cpu")
        after = step(model, inputs)
        return {f"{when} {k}": v for when, results in (("1", before), ("2", after)) for k, v in results.items()}

    assert_parity(build, run)
    layer = next(iter(lora_layers(build()).values()))
    assert isinstance(layer.scaling["default"], Tensor) == prepared


def test_hotswap_of_a_compiled_model_recompiles_nothing(tmp_path: Path) -> None:
    torch.compiler.reset()
    path, graphs = saved(tmp_path, layers=1, r=4, lora_alpha=3), []
    model, inputs = peft_model("llama", layers=1), batch()
    fastlora.patch(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, fullgraph=True, backend=backend)
    before = logits(fast, inputs)
    hotswap_adapter(model, str(path), "default", torch_device="cpu")
    after = logits(fast, inputs)
    assert len(graphs) == 1 and not torch.equal(before, after)
    assert_same(after, logits(model, inputs))


def test_load_adapter(tmp_path: Path) -> None:
    model, inputs = peft_model(), batch()
    ours, _ = copies(model)
    path = saved(tmp_path, r=6)
    for either in (model, ours):
        either.load_adapter(path, "loaded")
        either.set_adapter("loaded")
    with counted() as calls:
        actual = logits(ours, inputs)
    assert calls == (len(lora_layers(model)), 0)
    exact = copy.deepcopy(model).double()
    assert_all_close([({"y": actual}, {"y": logits(model, inputs)}, {"y": logits(exact, inputs)})])


def test_modules_of_a_later_adapter_are_patched_by_patching_again() -> None:
    model = peft_model(target_modules=["q_proj"])
    assert len(fastlora.patch(model).patched) == 2
    model.add_adapter("other", lora_config(target_modules=["q_proj", "v_proj"]))
    model.set_adapter("other")
    with counted() as calls:
        logits(model, batch())
    assert calls == (2, 0)
    assert len(fastlora.patch(model).patched) == 4
    with counted() as calls:
        logits(model, batch())
    assert calls == (4, 0)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers' add_adapter wants {MIN_PEFT_VERSION}"
)
def test_adapters_added_without_a_peft_model() -> None:
    """transformers' own model.add_adapter makes the same layers, and they are patched the same."""
    model, inputs = base_model(), batch()
    model.add_adapter(lora_config())
    expected = logits(model, inputs)
    assert len(fastlora.patch(model, strict=True).patched) == 14
    with counted() as calls:
        actual = logits(model, inputs)
    assert calls == (14, 0)
    exact = logits(copy.deepcopy(model).double(), inputs)
    assert_all_close([({"y": actual}, {"y": expected}, {"y": exact})])


@pytest.mark.parametrize("family", FAMILIES)
def test_register(family: str, tmp_path: Path) -> None:
    """Layers made from a registered config are patched from birth, those of later adapters too; files are PEFT's."""
    config = lora_config(family, target_modules=TARGETS[family][:1])
    assert fastlora.register(config) is config
    model = get_peft_model(base_model(family), config)
    first = lora_layers(model)
    assert all(type(layer) is FusedLinear for layer in first.values())
    later = fastlora.register(lora_config(family, target_modules="all-linear"))
    model.add_adapter("later", later)
    model.set_adapter("later")
    layers = lora_layers(model)
    assert len(layers) > len(first)
    assert all(type(layer) is FusedLinear for layer in layers.values())
    with counted() as calls:
        expected = logits(model, batch(family))
    assert calls == (len(layers), 0)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "later", "again")
    model.set_adapter("again")
    torch.manual_seed(0)
    assert expected.shape == logits(model, batch(family)).shape
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "later", "later")
    assert not any(type(layer) is FusedLinear for layer in lora_layers(loaded).values())


def test_register_lets_peft_correct_the_config() -> None:
    """PEFT sets fan_in_fan_out on the very object it was given."""
    config = fastlora.register(LoraConfig(target_modules=["c_attn"]))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(base_model("gpt2"), config)
    assert config.fan_in_fan_out and all(layer.fan_in_fan_out for layer in lora_layers(model).values())


def test_register_leaves_other_kinds_to_peft() -> None:
    """An embedding is PEFT's; somebody else's custom module comes before ours where it was registered."""

    class Special(nn.Linear):
        pass

    class Theirs(FusedLinear):
        pass

    model = base_model()
    model.lm_head = Special(64, 64)
    config = lora_config(target_modules=["embed_tokens", "q_proj", "lm_head"])
    config._register_custom_module({Special: Theirs})
    model = get_peft_model(model, fastlora.register(config))
    kinds = {name.split(".")[-1]: type(layer).__name__ for name, layer in lora_layers(model).items()}
    assert kinds == {"embed_tokens": "Embedding", "q_proj": "FusedLinear", "lm_head": "Theirs"}
    assert set(config._custom_modules) == {Special, nn.Linear, Conv1D}
    report = fastlora.patch(model)
    assert len(report.patched) == 2 and "PEFT's Theirs is not a layer" in str(report)
    fastlora.unpatch(model)


def test_register_wants_a_lora_config() -> None:
    with pytest.raises(TypeError, match="lora_config: got dict"):
        fastlora.register({})  # type: ignore[type-var]
