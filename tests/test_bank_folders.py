"""Folders that PEFT writes by its less usual options: what PEFT makes of them we do, or refuse with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from banked import bank_of, model_of, saved, state_of
from models import batch, logits, lora_config, peft_model
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from tenants import small
from tolerance import assert_same, relative_error
from torch import Tensor, nn

from fastlora import AdapterBank, Jobs, load_soft_prompt


def trained(base: nn.Module, start: Any, **options: Any) -> PeftModel:
    """An adapter that began so, and whose factors have moved since."""
    model = get_peft_model(copy.deepcopy(base), lora_config(init_lora_weights=start, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def served(bank: AdapterBank, name: str) -> Tensor:
    torch.manual_seed(5)
    inputs = batch()
    with bank.use([name] * 3):
        return logits(model_of(bank), inputs)


def in_peft(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return logits(model, batch())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused_until_they_are_converted(
    start: str, base: nn.Module, tmp_path: Path
) -> None:
    begun = get_peft_model(copy.deepcopy(base), lora_config(init_lora_weights=start))
    begun.save_pretrained(tmp_path / "begun")
    model = trained(base, start)
    model.save_pretrained(tmp_path / "raw")
    changed = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "raw").eval()
    bank = bank_of(base)
    said = rf"init_lora_weights='{start}', which changes the base.*path_initial_model_for_weight_conversion"
    with pytest.raises(ValueError, match=said):
        bank.load_adapter(tmp_path / "raw", "a")
    with pytest.raises(ValueError, match=said):
        Jobs(copy.deepcopy(base)).load(tmp_path / "raw", "a")
    on_the_changed = AdapterBank(copy.deepcopy(changed).unload())
    state, config = state_of(model)
    on_the_changed.load_adapter(state, "a", config={**config, "init_lora_weights": True})
    assert relative_error(served(on_the_changed, "a"), in_peft(changed)) < 1e-5
    model.save_pretrained(tmp_path / "whole", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    bank.load_adapter(tmp_path / "whole", "a")
    assert relative_error(served(bank, "a"), in_peft(changed)) < 1e-4


@pytest.mark.parametrize("start", ["pissa_niter_4", "PiSSA", "corda", "loftq"])
def test_every_spelling_of_a_start_that_changes_the_base_is_refused(start: str, base: nn.Module) -> None:
    state, config = state_of(trained(base, True))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base"):
        bank_of(base).load_adapter(state, "a", config={**config, "init_lora_weights": start})


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva", "lora_ga"])
def test_starts_that_leave_the_base_alone_are_served_as_peft_loads_them(
    start: Any, base: nn.Module, tmp_path: Path
) -> None:
    folder = saved(trained(base, start), tmp_path)
    bank = bank_of(base)
    bank.load_adapter(folder, "a")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert relative_error(served(bank, "a"), in_peft(theirs)) < 1e-5


def test_an_adapter_on_the_head_comes_with_the_base_s_head(base: nn.Module, tmp_path: Path) -> None:
    targets = ["q_proj", "lm_head"]
    model = trained(base, False, target_modules=targets)
    folder = saved(model, tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    state, config = load_file(folder / "adapter_model.safetensors"), state_of(model)[1]
    assert key in state, "PEFT saves the head with it"
    bank = bank_of(base, target_modules=targets)
    bank.load_adapter(folder, "a")
    assert relative_error(served(bank, "a"), in_peft(model)) < 1e-5
    model.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    bank.load_adapter(tmp_path / "all", "with all embeddings")
    assert_same(served(bank, "with all embeddings"), served(bank, "a"))
    before = bank.list_adapters()
    for other in (state[key] + 1e-3, state[key][:-1]):
        with pytest.raises(ValueError, match=r"got lm_head\.base_layer\.weight of a base that differs"):
            bank.load_adapter({**state, key: other}, "b", config=config)
    with pytest.raises(ValueError, match="got factors for lm_head, which the model has and the bank does not serve"):
        bank_of(base).load_adapter(folder, "a")
    assert bank.list_adapters() == before


def test_a_model_prepared_for_hotswap_is_taken_over_by_its_padded_ranks() -> None:
    model = peft_model(r=4, rank_pattern={"v_proj": 2}).eval()
    want = in_peft(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    bank = AdapterBank(model)
    assert [adapter.rank for adapter in bank.list_adapters()] == [8]
    torch.manual_seed(5)
    with bank.use(["default"] * 3):
        assert relative_error(logits(model, batch()), want) < 1e-5


@pytest.mark.parametrize("parts", [1, 2])
def test_prompts_of_an_encoder_with_or_without_rows_for_its_decoder(parts: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = small("t5")
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=parts)
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    nn.init.normal_(peft.prompt_encoder["default"].embedding.weight)
    folder, inputs = saved(peft, tmp_path), batch("t5")
    bank, ours = AdapterBank(copy.deepcopy(base)), copy.deepcopy(base)
    bank.load_adapter(folder, "p")
    with bank.use(prompt_names=["p"] * 3):
        assert relative_error(logits(model_of(bank), inputs), logits(peft, inputs)) < 1e-5
    load_soft_prompt(ours, folder).save(tmp_path / "again")
    assert relative_error(logits(ours, inputs), logits(peft, inputs)) < 1e-5
    bank.load_adapter(tmp_path / "again", "again")
    with bank.use(prompt_names=["again"] * 3):
        assert relative_error(logits(model_of(bank), inputs), logits(peft, inputs)) < 1e-5
    state, options = state_of(peft)
    for change, said in (
        (dict(num_transformer_submodules=3), "submodules=3, wanted 1 to 2"),
        (dict(task_type="CAUSAL_LM"), "got task_type 'CAUSAL_LM'"),
    ):
        with pytest.raises(ValueError, match=said):
            bank.load_adapter(state, "q", config={**options, **change})
