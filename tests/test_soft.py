"""Soft prompts in training: against PEFT's prompt tuning, and against rows put together by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import VOCABULARY, lora_config
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tenants import CAUSAL, FAMILIES, one, padded, rows_of, small, with_prompt
from tolerance import assert_all_close, assert_same, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Trainer, TrainingArguments

import fastlora
from fastlora import AdapterBank, LoRALinear, SoftPrompt, add_soft_prompt, load_soft_prompt, set_soft_prompt

P = 5
GENERATED = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


def rows_for(model: Any, tokens: int = P) -> Tensor:
    weight = model.get_input_embeddings().weight
    return torch.randn(tokens, weight.shape[1], dtype=weight.dtype) * weight.std().detach()


def prompt_of(model: Any, rows: Tensor) -> SoftPrompt:
    seq2seq = model.config.is_encoder_decoder
    prompt = SoftPrompt(len(rows), model.get_input_embeddings(), encoder_decoder=seq2seq)
    prompt.weight.data.copy_(rows)
    return prompt


def pair(
    family: str, tokens: int = P, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Any, SoftPrompt, Any]:
    """(a model with our prompt, the prompt, PEFT's prompt tuning of a copy with the same)."""
    torch.manual_seed(seed)
    model = small(family).to(dtype)
    rows = rows_for(model, tokens)
    peft = with_prompt(copy.deepcopy(model), rows, family)
    return model, add_soft_prompt(model, prompt_of(model, rows)), peft


def batch(family: str, side: str = "right") -> dict[str, Tensor]:
    inputs = padded(rows_of(), side)
    labels = inputs["input_ids"] if family in CAUSAL else torch.randint(3, VOCABULARY, (5, 4))
    mask = inputs["attention_mask"] if family in CAUSAL else torch.ones_like(labels)
    return {**inputs, "labels": labels.masked_fill(mask == 0, -100)}


def step(model: Any, weight: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of what is attended to, loss, and the gradient of the virtual tokens."""
    out = model(**inputs)
    own = F.pad(inputs["attention_mask"], (out.logits.shape[1] - inputs["attention_mask"].shape[1], 0), value=1)
    logits = out.logits if model.config.is_encoder_decoder else out.logits[own.bool()]
    weight.grad = None
    out.loss.backward()
    assert weight.grad is not None
    return {"logits": logits.detach(), "loss": out.loss.detach(), "prompt": weight.grad[:P]}


def in_peft(model: Any) -> Tensor:
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    return weight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_a_training_step_is_that_of_peft(family: str, precision: str) -> None:
    draws, autocast = [], precision == "autocast"
    for seed in range(3):
        model, prompt, peft = pair(family, seed=seed, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        exact, inputs = copy.deepcopy(peft).double(), batch(family)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = step(model, prompt.weight, inputs), step(peft, in_peft(peft), inputs)
        draws.append((ours, theirs, step(exact, in_peft(exact), inputs)))
    assert_all_close(draws)


def by_hand(model: Any, weight: Tensor, row: Tensor, labels: Tensor) -> Tensor:
    """Logits of one row whose virtual tokens and own are put one after the other, without mask or positions."""
    embeds = torch.cat([weight, model.get_input_embeddings()(row)])[None]
    extra = {"labels": labels[None]} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(inputs_embeds=embeds, **extra).logits[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_put_together_by_hand(family: str, side: str) -> None:
    plain = small(family).double()
    model, rows, labels = copy.deepcopy(plain), rows_of(), torch.randint(3, VOCABULARY, (5, 4))
    prompt = add_soft_prompt(model, prompt_of(model, rows_for(model)))
    weight, inputs = prompt.weight.detach().clone().requires_grad_(), padded(rows, side)
    logits = model(**inputs, **({} if family in CAUSAL else {"labels": labels})).logits
    ours = []
    for i, row in enumerate(rows):
        own = torch.cat([torch.ones(P), inputs["attention_mask"][i]]).bool()
        ours.append(logits[i][own] if family in CAUSAL else logits[i])
        hand = by_hand(plain, weight, row, labels[i])
        assert relative_error(ours[i], hand) < 1e-12
        dy = torch.randn_like(hand)
        (hand * dy).sum().backward()
        (ours[i] * dy).sum().backward(retain_graph=True)
    assert prompt.weight.grad is not None and weight.grad is not None
    assert relative_error(prompt.weight.grad, weight.grad) < 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_that_are_given_come_after_the_virtual_tokens(family: str) -> None:
    model, _, _ = pair(family)
    ids = one(rows_of()[0])["input_ids"]
    positions = torch.arange(ids.shape[1])[None]
    assert_same(model(input_ids=ids, position_ids=positions).logits, model(input_ids=ids).logits)
    with pytest.raises(AssertionError):
        assert_same(model(input_ids=ids, position_ids=2 * positions).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("tokens", [1, 1024])
def test_one_token_and_a_thousand(tokens: int, family: str) -> None:
    model, prompt, peft = pair(family, tokens)
    inputs = {key: t for key, t in batch(family).items() if key != "attention_mask"}
    ours, theirs = model(**inputs), peft(**inputs)
    assert relative_error(ours.logits, theirs.logits) < 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    assert prompt.weight.grad is not None and prompt.weight.grad.shape == (tokens, 64)
    assert relative_error(prompt.weight.grad, in_peft(peft).grad[:tokens]) < 1e-4  # type: ignore[index]
    row = one(rows_of()[0])
    assert_same(model.generate(**row, **GENERATED)[:, -6:], peft.generate(**row, **GENERATED)[:, -6:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train", "beams", "checkpointing"])
def test_generating_gives_what_peft_gives_each_row_alone(family: str, mode: str) -> None:
    model, prompt, peft = pair(family)
    prompt.weight.data.mul_(2)
    in_peft(peft).data[:P].mul_(2)
    options = GENERATED | ({"num_beams": 2} if mode == "beams" else {})
    rows = rows_of()
    inputs = padded(rows, "left")
    before = inputs["input_ids"].shape[1] if family in CAUSAL else 0
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = model.train(mode in ("train", "checkpointing")).generate(**inputs, **options)
    for row, mine in zip(rows, ours, strict=True):
        theirs = peft.generate(**one(row), **options)[0]
        theirs = theirs[len(row) :] if family in CAUSAL else theirs
        assert_same(mine[before : before + len(theirs)], theirs)
    set_soft_prompt(model, None)
    assert not torch.equal(model.generate(**inputs, **options), ours)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model, prompt, _ = pair(family)
    inputs = batch(family)
    model.train()
    plain = step(model, prompt.weight, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is True)
    assert layer.training
    for name, value in step(model, prompt.weight, inputs).items():
        assert relative_error(value, plain[name]) < 1e-5  # T5's attention is another without a cache


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_frozen_and_the_prompt_is_all_that_trains(family: str) -> None:
    model, prompt, _ = pair(family)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(prompt.weight)]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_prompts_are_swapped_by_name_to_the_bit(family: str) -> None:
    model, inputs = small(family).requires_grad_(False), batch(family)  # T5's sums take another order with gradients
    base = model(**inputs).logits
    seen = {}
    for name in ("one", "two"):
        add_soft_prompt(model, P, name)
        seen[name] = model(**inputs).logits
    assert not torch.equal(seen["one"], seen["two"])
    for name in ("one", "two", "one"):
        set_soft_prompt(model, name)
        assert_same(model(**inputs).logits, seen[name])
    set_soft_prompt(model, None)
    assert_same(model(**inputs).logits, base)
    fastlora.remove_soft_prompts(model)
    assert_same(model(**inputs).logits, base)
    assert "_prompted" not in repr(type(model).forward) and not hasattr(model, "soft_prompts")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_under_hooks_of_accelerate_reads_its_prompt(family: str) -> None:
    model, prompt, _ = pair(family)
    inputs = batch(family)
    wanted = model(**inputs).logits
    fastlora.remove_soft_prompts(model)
    bare = model(**inputs).logits
    for module in (model, model.get_encoder()) if family == "t5" else (model,):
        add_hook_to_module(module, ModelHook())
    add_soft_prompt(model, prompt)
    assert_same(model(**inputs).logits, wanted)
    fastlora.remove_soft_prompts(model)
    assert_same(model(**inputs).logits, bare)


def test_a_cache_of_one_prompt_is_refused_under_another() -> None:
    model, _, _ = pair("llama")
    ids = batch("llama")["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    full = model(torch.cat([ids, ids], 1)).logits[:, -ids.shape[1] :]
    assert relative_error(model(ids, past_key_values=copy.deepcopy(cache)).logits, full) < 1e-5
    for name in (None, "other"):
        if name:
            add_soft_prompt(model, P, name)
        set_soft_prompt(model, name)
        with pytest.raises(ValueError, match="got a cache begun with another soft prompt"):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="got StaticCache, without room for virtual tokens"):
        model.generate(ids, cache_implementation="static", use_cache=True, **GENERATED)
    assert model(ids, past_key_values=DynamicCache()).logits.shape[1] == P + ids.shape[1]


def with_lora(family: str, how: str) -> tuple[Any, Any, SoftPrompt]:
    """(the model to call, the model of transformers in it, its prompt), with LoRA by PEFT, or LoRALinear."""
    hugging = small(family)
    rows = rows_for(hugging)
    if how == "modules":
        for name, linear in [(n, m) for n, m in hugging.named_modules() if n.endswith(("v_proj", "SelfAttention.v"))]:
            layer = LoRALinear.from_linear(linear, r=4)
            nn.init.normal_(layer.lora_B.weight, std=0.2)
            parent, _, last = name.rpartition(".")
            setattr(hugging.get_submodule(parent), last, layer)
        return hugging, hugging, add_soft_prompt(hugging, prompt_of(hugging, rows))
    if how == "prompt first":
        prompt = add_soft_prompt(hugging, prompt_of(hugging, rows))
        model = get_peft_model(hugging, lora_config(family))
        prompt.requires_grad_(True)
    else:
        model = get_peft_model(hugging, lora_config(family))
        prompt = add_soft_prompt(model, prompt_of(hugging, rows))
    assert len(fastlora.patch(model).patched) > 0
    return model, hugging, prompt


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", ["modules", "prompt first", "lora first"])
def test_lora_and_a_prompt_in_one_model_are_trained_together_or_apart(family: str, how: str) -> None:
    model, _, prompt = with_lora(family, how)
    inputs = batch(family)
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    everything = {n for n, p in model.named_parameters() if p.requires_grad}
    assert everything == {*lora, next(n for n, p in model.named_parameters() if p is prompt.weight)}
    for trained in ("both", "prompt", "lora"):
        prompt.requires_grad_(trained != "lora")
        for parameter in lora.values():
            parameter.requires_grad_(trained != "prompt")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        wanted = {"both": everything, "prompt": everything - {*lora}, "lora": {*lora}}[trained]
        assert changed == wanted, f"{trained}: {sorted(changed ^ wanted)[:3]}"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", ["modules", "prompt first", "lora first"])
def test_lora_reads_the_virtual_tokens_too(family: str, how: str) -> None:
    model, hugging, prompt = with_lora(family, how)
    row, labels = rows_of()[0], torch.randint(3, VOCABULARY, (4,))
    ours = model(**one(row), **({} if family in CAUSAL else {"labels": labels[None]})).logits[0]
    generated = model.generate(**one(row), **GENERATED)
    set_soft_prompt(model, None)
    assert relative_error(ours, by_hand(hugging, prompt.weight, row, labels)) < 1e-5
    embeds = torch.cat([prompt.weight, hugging.get_input_embeddings()(row)])[None]
    by_embeds = hugging.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **GENERATED)
    assert_same(generated[:, -by_embeds.shape[1] :], by_embeds)


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
    with pytest.raises(ValueError, match="got shape"):
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


def test_prompt_tuning_learns_what_pefts_learns() -> None:
    model, prompt, peft = pair("llama")
    inputs = batch("llama")
    histories = []
    for net, weight in ((model, prompt.weight), (peft, in_peft(peft))):
        optimizer, losses = torch.optim.AdamW([weight], 0.05, weight_decay=0), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = net(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        histories.append(torch.stack(losses))
    assert relative_error(*histories) < 1e-4 and histories[0][-1] < 0.9 * histories[0][0]


def test_peft_refuses_both_in_one_model_where_we_do_not() -> None:
    with pytest.raises(ValueError):
        both = get_peft_model(small("llama"), lora_config())
        both.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    model, _, prompt = with_lora("llama", "lora first")
    assert model(**batch("llama")).logits.shape[1] > P and prompt.weight.requires_grad
