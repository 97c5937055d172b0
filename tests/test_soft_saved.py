"""Soft prompts that leave the hand that made them: saved, served by a bank, refused, in Trainer and in copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import lora_config
from peft import PeftModel, get_peft_model
from prompted import P, batch, in_peft, pair, prompt_of, rows_for, with_lora
from safetensors.torch import load_file
from tenants import CAUSAL, rows_of, small
from tolerance import assert_same, relative_error
from torch import nn
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora import AdapterBank, SoftPrompt, add_soft_prompt, load_soft_prompt, set_soft_prompt


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_what_we_save_peft_loads_and_what_peft_saves_we_load(family: str, tmp_path: Path) -> None:
    model, prompt, peft = pair(family)
    inputs = {key: t for key, t in batch(family).items() if key != "attention_mask"}
    prompt.save(tmp_path / "ours")
    assert {f.name for f in (tmp_path / "ours").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    set_soft_prompt(model, None)
    bare = small(family)
    bare.load_state_dict(model.state_dict(), strict=False)
    theirs = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "ours")
    set_soft_prompt(model, "default")
    assert relative_error(model(**inputs).logits, theirs(**inputs).logits) < 1e-6
    both = prompt.weight if prompt.decoder_weight is None else torch.cat([prompt.weight, prompt.decoder_weight])
    assert_same(in_peft(theirs), both)  # encoder rows first

    peft.save_pretrained(tmp_path / "theirs")
    loaded = load_soft_prompt(bare, tmp_path / "theirs", "theirs")
    assert relative_error(bare(**inputs).logits, peft(**inputs).logits) < 1e-6
    loaded.save(tmp_path / "again")
    first, again = (tmp_path / f / "adapter_model.safetensors" for f in ("theirs", "again"))
    assert fastlora.SoftPrompt.load(tmp_path / "again", loaded.embedding, encoder_decoder=family not in CAUSAL)
    assert first.read_bytes()[-both.nbytes :] == again.read_bytes()[-both.nbytes :]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", ["alone", "with LoRA"])
def test_what_was_trained_here_is_served_by_the_bank(family: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, served, prompt = *[small(family)] * 2, None
    if how == "alone":
        prompt = add_soft_prompt(model, prompt_of(model, rows_for(model)))
    else:
        served = copy.deepcopy(model)
        model = get_peft_model(model, lora_config(family))
        prompt = add_soft_prompt(model, prompt_of(served, rows_for(served)))
        fastlora.patch(model)
        model.save_pretrained(tmp_path / "lora")
    inputs = {key: t for key, t in batch(family).items() if key != "attention_mask"}
    trained = model(**inputs).logits
    prompt.save(tmp_path / "prompt")
    if how == "alone":
        fastlora.remove_soft_prompts(served)
    base = served(**inputs).logits
    bank = AdapterBank(served)
    bank.load_adapter(tmp_path / "prompt", "mine")
    tenants: dict[str, Any] = {"prompt_names": ["mine"] * 4 + [None]}
    if how != "alone":
        bank.load_adapter(tmp_path / "lora", "mine too")
        tenants["adapter_names"] = ["mine too"] * 4 + [None]
    columns = inputs["labels"].shape[1]
    with torch.no_grad(), bank.use(**tenants):
        logits = served(**inputs).logits[:, -columns:]
    assert relative_error(logits[:4], trained[:4, -columns:]) < 1e-5
    assert relative_error(logits[4], base[4]) < 1e-5
    assert relative_error(base[:4], trained[:4, -columns:]) > 0.01


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model, prompt, _ = pair("llama")
    embedding = model.get_input_embeddings()
    for tokens in (0, 1025, 2.0, True):
        with pytest.raises(ValueError, match=r"num_virtual_tokens: got .*, wanted a whole number from 1 to 1024"):
            SoftPrompt(tokens, embedding)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init: got 'zeros', wanted 'random', 'vocab' or 'text'"):
        SoftPrompt(2, embedding, "zeros")
    with pytest.raises(ValueError, match="init: got 'text' with text=None"):
        SoftPrompt(2, embedding, "text")
    with pytest.raises(TypeError, match="embedding: got LayerNorm"):
        SoftPrompt(2, nn.LayerNorm(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name: got 'default', which the model has"):
        add_soft_prompt(model, 3)
    with pytest.raises(ValueError, match="prompt: got virtual tokens of 8, wanted the model's 64"):
        add_soft_prompt(model, SoftPrompt(2, nn.Embedding(9, 8)), "wide")
    with pytest.raises(ValueError, match="name: got 'nobody', wanted one of the model's: default"):
        set_soft_prompt(model, "nobody")
    with pytest.raises(ValueError, match="model: got one without soft prompts"):
        set_soft_prompt(small("llama"), "default")
    with pytest.raises(ValueError, match=r"attention_mask: got .* without the virtual tokens"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3 + P))
    get_peft_model(small("llama"), lora_config()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora"):
        SoftPrompt.load(tmp_path / "lora", embedding)
    prompt.save(tmp_path / "prompt")
    with pytest.raises(ValueError, match="got task_type 'CAUSAL_LM'"):
        SoftPrompt.load(tmp_path / "prompt", embedding, encoder_decoder=True)


@pytest.mark.parametrize("how", ["alone", "lora first"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer_trains_it(how: str, bf16: bool, tmp_path: Path) -> None:
    model, prompt, _ = pair("llama")
    if how == "lora first":
        model, _, prompt = with_lora("llama", how)
    row = rows_of()[0]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row, "extra": 1}] * 16
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=8, learning_rate=0.05, use_cpu=True, bf16=bf16,
        report_to=[], gradient_checkpointing=True, save_steps=8, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if "lora_" in n or p is prompt.weight}
    ids = row[None]
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert model(input_ids=ids).logits.shape[1] == P + len(row), "it reads its prompt after Trainer as before"
    kept = load_file(next((tmp_path / "checkpoint-8").glob("*model.safetensors")))
    assert any("soft_prompts" in key for key in kept) == (how == "alone"), "PEFT saves its own alone"


def test_a_copy_is_a_model_of_its_own() -> None:
    model, prompt, _ = pair("t5")
    inputs = batch("t5")
    before, twin = model(**inputs).logits, copy.deepcopy(model)
    assert_same(twin(**inputs).logits, before)
    prompt.weight.data.zero_()
    assert_same(twin(**inputs).logits, before)
    assert not torch.equal(model(**inputs).logits, before)
    assert twin.encoder.soft_prompts["default"].embedding.weight is twin.shared.weight
