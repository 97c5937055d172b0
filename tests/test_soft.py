"""Soft prompts in training: against PEFT's prompt tuning, and against rows put together by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import VOCABULARY, lora_config
from peft import PromptTuningConfig, get_peft_model
from prompted import P, batch, in_peft, pair, prompt_of, rows_for, with_lora
from tenants import BY_COLUMN, CAUSAL, FAMILIES, one, padded, rows_of, small
from tolerance import assert_all_close, assert_same, relative_error
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import fastlora
from fastlora import add_soft_prompt, set_soft_prompt

GENERATED = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


def step(model: Any, weight: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of what is attended to, loss, and the gradient of the virtual tokens."""
    out = model(**inputs)
    own = F.pad(inputs["attention_mask"], (out.logits.shape[1] - inputs["attention_mask"].shape[1], 0), value=1)
    logits = out.logits if model.config.is_encoder_decoder else out.logits[own.bool()]
    weight.grad = None
    out.loss.backward()
    assert weight.grad is not None
    return {"logits": logits.detach(), "loss": out.loss.detach(), "prompt": weight.grad[:P]}


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


@pytest.mark.parametrize("family", (*FAMILIES, *BY_COLUMN))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_put_together_by_hand(family: str, side: str) -> None:
    plain = small(family)
    bound = 1e-5  # in float64 these sum in float32, and MPT and BLOOM have NaN where nothing is attended to
    if family not in BY_COLUMN:
        plain, bound = plain.double(), 1e-12
    model, rows, labels = copy.deepcopy(plain), rows_of(), torch.randint(3, VOCABULARY, (5, 4))
    prompt = add_soft_prompt(model, prompt_of(model, rows_for(model)))
    weight, inputs = prompt.weight.detach().clone().requires_grad_(), padded(rows, side)
    logits = model(**inputs, **({} if family in CAUSAL else {"labels": labels})).logits
    ours = []
    for i, row in enumerate(rows):
        own = slice(-len(row) - P, None) if side == "left" else slice(len(row) + P)
        ours.append(logits[i][own] if family in CAUSAL else logits[i])
        hand = by_hand(plain, weight, row, labels[i])
        assert relative_error(ours[i], hand) < bound
        dy = torch.randn_like(hand)
        (hand * dy).sum().backward()
        (ours[i] * dy).sum().backward(retain_graph=True)
    assert prompt.weight.grad is not None and weight.grad is not None
    assert relative_error(prompt.weight.grad, weight.grad) < bound


@pytest.mark.parametrize("family", ["llama", "t5", "gpt_neo"])
def test_padding_on_the_left_costs_what_padding_on_the_right_does(family: str) -> None:
    """The first token of a row is predicted by its last virtual token, and not by its padding."""
    model, prompt, _ = pair(family)
    sides = []
    for side in ("left", "right"):
        torch.manual_seed(1)
        sides.append(step(model, prompt.weight, batch(family, side)))
    for name in ("loss", "prompt"):
        assert relative_error(sides[0][name], sides[1][name]) < 1e-5


def test_virtual_tokens_predict_no_label_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = pair("llama")
    seen: list[Tensor] = []
    monkeypatch.setattr(type(model), "loss_function", lambda self, labels, **_: seen.append(labels))
    inputs = padded(rows_of((2, 4)), "left")
    model(**inputs, labels=inputs["input_ids"])  # padding is not masked out
    (first, second), none = inputs["input_ids"].tolist(), [-100] * P
    assert seen[0].tolist() == [[*first[:2], *none, *first[2:]], [*none, *second]]


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_row_may_begin_in_a_later_chunk(family: str, chunk: int) -> None:
    model, _, _ = pair(family)
    inputs = padded(rows_of(), "left")
    ids, mask, cache, last = inputs["input_ids"], inputs["attention_mask"], None, None
    with torch.no_grad():
        for at in range(0, 7, chunk):
            upto = at + chunk
            out = model(ids[:, at:upto], attention_mask=mask[:, :upto], past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1]
        torch.testing.assert_close(last, model(**inputs).logits[:, -1])


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


@pytest.mark.parametrize(
    ("family", "mode"),
    [(f, mode) for f in FAMILIES for mode in ("eval", "train", "beams", "checkpointing")]
    + [(f, mode) for f in ("gpt_neo", "mpt") for mode in ("eval", "beams")],
)
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
        theirs = peft.generate(**one(row), **options, use_cache=False)[0]  # PEFT 0.21.2 errs on 5.24 caches
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
        with pytest.raises(ValueError, match="got one begun with another soft prompt"):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="got StaticCache, without room for virtual tokens"):
        model.generate(ids, cache_implementation="static", use_cache=True, **GENERATED)
    assert model(ids, past_key_values=DynamicCache()).logits.shape[1] == P + ids.shape[1]


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
