"""Groups of a patched model compute PEFT's numbers, whatever the family, the options and the life of the adapters."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grouping import STRUCTURES, K, Three, group_calls, outcome, wrap
from models import assert_parity, base_model, batch, lora_config, lora_layers, peft_model, step
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn

import fastlora

pytestmark = pytest.mark.usefixtures("groups_alone")


DRAWS = 12
"""Errors of one draw of a whole model share their luck: over 70 draws the logarithm of their mean ratio to PEFT's has a
deviation of 0.2 (and a mean of -0.02), so that a dozen put log 1.25 four of its deviations away."""

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "all": ({}, 4),
    "q,v only": ({"target_modules": ["q_proj", "v_proj"]}, 2),
    "ranks and alphas": ({"rank_pattern": {"q_proj": 7, "up_proj": 1}, "alpha_pattern": {"v_proj": 5}}, 4),
    "lora_bias": ({"lora_bias": True}, 4),
    "rsLoRA": ({"use_rslora": True}, 4),
}


def run_grouped(count: int) -> Any:
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with group_calls() as calls:
            results = step(model, inputs)
        ours = any("Fused" in type(layer).__name__ for layer in lora_layers(model).values())
        assert calls.call_count == (count if ours else 0), calls.call_count
        return results

    return run


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize("case", CASES)
def test_options_give_pefts_numbers(case: str) -> None:
    options, count = CASES[case]
    assert_parity(lambda: peft_model("llama", **options), run_grouped(count), draws=DRAWS)


@pytest.mark.parametrize("family", STRUCTURES)
def test_families_give_pefts_numbers(family: str) -> None:
    build, _, count = STRUCTURES[family]

    def peft() -> nn.Module:
        base = build().eval()
        base.loss_type = "ForCausalLM"
        return get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))

    expected = len(fastlora.patch(peft()).groups)
    assert expected >= count
    assert_parity(peft, run_grouped(expected), "t5" if family == "t5" else "llama", draws=8)


@pytest.mark.parametrize("mix", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_16_bit_base(mix: tuple[torch.dtype, torch.dtype]) -> None:
    def build() -> nn.Module:
        default = mix[1] == torch.float32
        return get_peft_model(base_model().to(mix[0]), lora_config(), autocast_adapter_dtype=default)

    assert_parity(build, run_grouped(4), draws=4)


def test_autocast() -> None:
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype != torch.float64):
            return run_grouped(4)(model, inputs)

    assert_parity(peft_model, run)


def lives(*, other: list[str] | None = None) -> PeftModel:
    """ "default" everywhere, and "other", of another rank, on some members."""
    model = peft_model(layers=1)
    model.add_adapter("other", lora_config(r=6, lora_alpha=5, target_modules=other or ["q_proj", "up_proj"]))
    return model


def test_the_life_of_adapters(tmp_path: Path) -> None:
    """Every state after the other on one patched model: members lack the active adapter, have two, or none at all."""

    def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}

        def note(what: str) -> None:
            results.update({f"{what} {name}": value.clone() for name, value in step(model, inputs).items()})

        note("default")
        model.set_adapter("other")
        note("other")
        model.base_model.set_adapter(["default", "other"])
        note("both")
        model.set_adapter("default")
        model.add_weighted_adapter(["default"], [0.5], "halved")
        model.set_adapter("halved")
        note("halved")
        model.merge_adapter()
        results["merged"] = model(**inputs).logits.detach()
        model.unmerge_adapter()
        model.delete_adapter("halved")
        model.set_adapter("default")
        note("deleted")
        with model.disable_adapter():
            results["disabled"] = model(**inputs).logits.detach()
        results["unloaded"] = model.merge_and_unload()(**inputs).logits.detach()
        return results

    assert_parity(lives, run, draws=3)


def test_members_without_the_active_adapter_stay_in_the_group() -> None:
    model = lives()
    fastlora.patch(model)
    model.set_adapter("other")
    with group_calls() as calls:
        step(model, batch())
        assert [[a is None for a in call.args[3]] for call in calls.call_args_list] == [
            [False, True, True],
            [True, False],
        ]
        model.base_model.set_adapter(["default", "other"])  # q and up have two: one by one
        step(model, batch())
    assert calls.call_count == 2


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Only reference counts free what is gone, as they do for a plain PEFT model."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_a_patched_model_goes_when_nobody_holds_it(family: str) -> None:
    model = peft_model(family)
    fastlora.patch(model)
    layers = [weakref.ref(layer) for layer in lora_layers(model).values()]
    del model
    assert [layer() for layer in layers] == [None] * len(layers)


@pytest.mark.usefixtures("_no_collector")
def test_merging_for_good_leaves_nothing_of_ours() -> None:
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    merged = model.merge_and_unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert not any("_siblings" in vars(module) for module in merged.modules())
    merged(**inputs)


def test_hotswap(tmp_path: Path) -> None:
    other, inputs = peft_model(), batch()
    other.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fastlora.patch(ours)
    with torch.no_grad():
        for layer in lora_layers(other).values():
            layer.lora_A.default.weight.mul_(-2)
    other.save_pretrained(tmp_path)
    before = step(ours, inputs)["logits"].detach()
    results = []
    for each in (ours, model, exact):
        hotswap_adapter(each, tmp_path, "default")
        results.append(step(each, inputs))
    assert not torch.equal(results[0]["logits"], before)
    assert_all_close([(results[0], results[1], results[2])])


@pytest.mark.parametrize("frozen", ["this.lora_A", "that.lora_B", "other.lora", "lora"])
def test_members_that_do_not_train(frozen: str) -> None:
    """Only what trains gets a gradient, as in PEFT; the others' are as before."""
    model, x = wrap(Three()), torch.randn(5, K)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name and frozen not in name)
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    with group_calls() as calls:
        actual = outcome(ours, x)
    assert calls.call_count == 1
    exact = outcome(copy.deepcopy(model).double(), x)
    assert_all_close([(actual, outcome(model, x), exact)])


def test_copies_have_siblings_of_their_own() -> None:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]

    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    expected = step(model, inputs)["logits"]
    for through in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved):
        other = through(model)
        with group_calls() as calls:
            assert_same(step(other, inputs)["logits"], expected)
        assert calls.call_count == 4
        with torch.no_grad():
            for layer in lora_layers(other).values():
                layer.base_layer.weight.zero_()
        assert_same(step(model, inputs)["logits"], expected)
    alone = copy.deepcopy(model.base_model.model.model.layers[0].self_attn.q_proj)
    x = torch.randn(2, 64)
    with group_calls() as calls:
        assert alone(x).shape == (2, 64)
    assert calls.call_count == 0, "a layer copied out of its group computed for siblings that it has not"
