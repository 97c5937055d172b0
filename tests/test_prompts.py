"""Soft prompts by request: each row of a mixed batch is that row alone, unpadded, in PEFT's prompt tuning."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import VOCABULARY, lora_config
from peft import get_peft_model, inject_adapter_in_model
from tenants import BY_COLUMN, FAMILIES, LENGTHS, WHO, Tenants, calls, one, padded, rows_of, small, with_prompt
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn

from fastlora import multi, serving
from fastlora.prompts import PromptOf, Prompts


@pytest.fixture(scope="module", params=FAMILIES)
def tenants(request: pytest.FixtureRequest) -> Tenants:
    return Tenants.of(request.param)


@pytest.fixture
def llama() -> Iterator[Tenants]:
    tenants = Tenants.of("llama")
    yield tenants
    tenants.prompts.close()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", (*FAMILIES, *BY_COLUMN))
def test_logits_and_loss_are_each_rows_own(family: str, side: str) -> None:
    draws = []
    for seed in range(3):
        tenants, rows = Tenants.of(family, seed), rows_of()
        batch = padded(rows, side)
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
        if not tenants.causal:
            batch["labels"] = torch.randint(3, VOCABULARY, (len(rows), 4))
        out = tenants.forward(WHO, **batch)
        results = [{"loss": out.loss}, {}, {}]
        own = batch["attention_mask"] == 1 if tenants.causal else torch.ones(len(rows), 4, dtype=torch.bool)
        for side_of, models in ((1, tenants.plain), (2, tenants.exact)):
            sums, counts = [], []
            for i, (row, P) in enumerate(zip(rows, WHO, strict=True)):
                labels = row[None] if tenants.causal else batch["labels"][i : i + 1]
                with torch.no_grad():
                    alone = models[P](**one(row), labels=labels)
                results[0][f"row {i}"] = out.logits[i][own[i]]
                results[side_of][f"row {i}"] = alone.logits[0, -int(own[i].sum()) :]
                counts.append(labels.numel() - (tenants.causal and not P))
                sums.append(alone.loss * counts[-1])
            results[side_of]["loss"] = torch.stack(sums).sum() / sum(counts)
        draws.append((results[0], results[1], results[2]))
    assert_all_close(draws)


def test_a_request_may_have_several_rows(tenants: Tenants) -> None:
    rows = [row for row in rows_of() for _ in range(2)]
    batch = padded(rows, "right")
    batch["labels"] = torch.randint(3, VOCABULARY, batch["input_ids"].shape)
    together, single = (tenants.forward(who, **batch) for who in (WHO, [P for P in WHO for _ in range(2)]))
    assert_same(together.logits, single.logits)
    assert_same(together.loss, single.loss)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_are_each_rows_own(tenants: Tenants, options: dict[str, int], use_cache: bool) -> None:
    rows = rows_of()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    batch = padded(rows, "left" if tenants.causal else "right")
    tokens = tenants.generate(WHO, **batch, **options, use_cache=use_cache)
    each = options.get("num_return_sequences", 1)
    assert len(tokens) == len(rows) * each
    for i, (row, P) in enumerate(zip(rows, WHO, strict=True)):
        alone = tenants.plain[P].generate(**one(row), **options, use_cache=False)  # PEFT 0.21.2 errs on 5.24 caches
        assert_same(tokens[i * each : (i + 1) * each, -6:], alone[:, -6:])
    unprompted = tenants.generate((0,) * 5, **batch, **options, use_cache=use_cache)
    changed = (tokens != unprompted).any(1).view(-1, each).any(1)
    assert changed[[1, 4]].sum() == 0 and changed[[0, 2, 3]].sum() > 1, "the prompts changed hardly anything"


@pytest.mark.parametrize("family", BY_COLUMN)
def test_models_that_count_columns_generate_behind_padding(family: str) -> None:
    tenants, rows = Tenants.of(family), rows_of()
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2)
    tokens = tenants.generate(WHO, **padded(rows, "left"), **options, use_cache=True)
    for mine, row, P in zip(tokens, rows, WHO, strict=True):
        assert_same(mine[-6:], tenants.plain[P].generate(**one(row), **options, use_cache=False)[0, -6:])


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "mpt"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_row_may_begin_in_a_later_chunk(family: str, chunk: int) -> None:
    tenants, batch = Tenants.of(family), padded(rows_of(), "left")
    ids, mask, cache, parts = batch["input_ids"], batch["attention_mask"], None, []
    for at in range(0, 7, chunk):
        upto = at + chunk
        chunked = {"input_ids": ids[:, at:upto], "attention_mask": mask[:, :upto], "past_key_values": cache}
        out = tenants.forward(WHO, **chunked, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    own = mask == 1
    torch.testing.assert_close(torch.cat(parts, 1)[own], tenants.forward(WHO, **batch).logits[own])


def test_left_padded_encoders_generate_the_same() -> None:
    tenants, rows = Tenants.of("t5"), rows_of()
    left, right = (tenants.generate(WHO, **padded(rows, side), max_new_tokens=6) for side in ("left", "right"))
    assert_same(left, right)


def test_sampling_obeys_its_seed_and_its_temperature(llama: Tenants) -> None:
    batch, drawn = padded(rows_of(), "left"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(llama.generate(WHO, **batch, do_sample=True, max_new_tokens=6, use_cache=True))
    assert_same(drawn[0], drawn[1])
    assert not drawn[0].equal(drawn[2])
    cold = llama.generate(WHO, **batch, do_sample=True, temperature=1e-4, max_new_tokens=6, use_cache=True)
    assert_same(cold, llama.generate(WHO, **batch, do_sample=False, max_new_tokens=6, use_cache=True))


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_other_ways_to_generate(llama: Tenants, options: dict[str, int]) -> None:
    (row,) = rows_of((6,))
    tokens = llama.generate((5,), **one(row), **options, max_new_tokens=12, use_cache=True)
    assert_same(tokens, llama.generate((5,), **one(row), max_new_tokens=12, use_cache=True))


def test_what_generate_returns_has_the_shapes_of_the_input(llama: Tenants) -> None:
    options = dict(max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_scores=True, use_cache=True)
    out: Any = llama.generate(WHO, **padded(rows_of(), "left"), **options)
    assert out.sequences.shape == (5, 7 + 4)
    assert len(out.scores) == 4 and out.scores[0].shape == (5, VOCABULARY)


def test_a_loop_of_ones_own_and_embeddings_of_ones_own(llama: Tenants) -> None:
    batch = padded(rows_of(), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = llama.forward(WHO, **batch).logits
    assert_same(
        llama.forward(WHO, attention_mask=mask, inputs_embeds=llama.model.get_input_embeddings()(ids)).logits, whole
    )
    assert_same(
        llama.model.__class__.forward(llama.plain[0], ids, mask).logits, llama.forward((0,) * 5, **batch).logits
    )
    with torch.no_grad(), llama.serving():
        positional, as_tuple = llama.model(ids, mask).logits, llama.model(**batch, return_dict=False)[0]
        out = llama.model(ids[:, :4], mask[:, :4], use_cache=True)
        steps = [out.logits]
        for t in range(4, 7):
            out = llama.model(ids[:, t : t + 1], mask[:, : t + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    assert_same(positional, whole)
    assert_same(as_tuple, whole)
    own = mask == 1
    torch.testing.assert_close(torch.cat(steps, 1)[own], whole[own])


def test_generate_takes_embeddings_and_refuses_what_it_does_not_know(llama: Tenants) -> None:
    batch, options = padded(rows_of(), "left"), dict(max_new_tokens=6, use_cache=True)
    embeds = llama.model.get_input_embeddings()(batch["input_ids"])
    tokens = llama.generate(WHO, inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    assert_same(tokens, llama.generate(WHO, **batch, **options)[:, 7:])
    assert inspect.signature(llama.model.forward) == inspect.signature(llama.plain[0].forward)
    with pytest.raises(ValueError, match="attenshun"):
        llama.generate(WHO, **batch, attenshun=1)


def test_a_peft_model_is_served_through_its_wrappers() -> None:
    torch.manual_seed(0)
    model = get_peft_model(small("llama"), lora_config()).eval()
    plain, rows, batch = copy.deepcopy(model), torch.randn(5, 64), padded(rows_of(), "left")
    prompts = Prompts(model, 1, 5)
    prompts.store(0, 0, rows)
    with prompts.serving([PromptOf(0, 0, 5, (0,))] * 5):
        logits = model(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=4, use_cache=True)
    embeds = torch.cat([rows, plain.get_input_embeddings()(batch["input_ids"][2])])[None]
    torch.testing.assert_close(logits[2], plain(inputs_embeds=embeds).logits[0, 5:])
    assert_same(tokens[2, 7:], plain.generate(inputs_embeds=embeds, max_new_tokens=4, use_cache=True)[0])


def test_given_positions_are_shifted_by_each_rows_own_prompt() -> None:
    tenants, batch = Tenants.of("gpt2"), padded(rows_of(), "left")
    own = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    implied, given, moved = (
        tenants.forward(WHO, **batch, **p).logits for p in ({}, {"position_ids": own}, {"position_ids": own + 1})
    )
    assert_same(given, implied)
    assert not moved.equal(implied)


def parts(model: Any) -> list[list[tuple[nn.Module, str]]]:
    """(parent, name) of the linears of a Llama, by groups that share an input."""
    groups = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups += [[(attention, f"{name}_proj") for name in "qkv"], [(attention, "o_proj")]]
        groups += [[(mlp, "gate_proj"), (mlp, "up_proj")], [(mlp, "down_proj")]]
    return groups


def test_prompts_together_with_adapters() -> None:
    draws = []
    for seed in range(3):
        tenants, rows, ranks = Tenants.of("llama", seed), rows_of(), {0: 3, 1: 8}
        adapted = {}
        for slot, R in ranks.items():
            injected = inject_adapter_in_model(lora_config(r=R), copy.deepcopy(tenants.plain[0]))
            for P in (0, *LENGTHS):
                request = tenants.requests[P]
                pool = tenants.prompts.pool[request.start : request.start + P] if request else None
                plain = injected if request is None else with_prompt(injected, pool, "llama")
                adapted[slot, P] = plain, copy.deepcopy(plain).double()
        adapted |= {(-1, P): (tenants.plain[P], tenants.exact[P]) for P in (0, *LENGTHS)}
        tables = multi.Tables.empty(2, 16, torch.device("cpu"))
        for named in zip(parts(tenants.model), *(parts(adapted[slot, 0][0]) for slot in ranks), strict=True):
            linears = [getattr(parent, name) for parent, name in named[0]]
            members = [multi.MultiLoRALinear(linear, linear.in_features, linear.out_features) for linear in linears]
            for (parent, name), member in zip(named[0], members, strict=True):
                setattr(parent, name, member)
            group = multi.Group(members, tables, torch.float32)
            for slot, start in ((0, 0), (1, 4)):
                tables.hold(slot, start, ranks[slot])
                layers = [getattr(parent, name) for parent, name in named[1 + slot]]
                factors = [
                    (l.lora_A["default"].weight, l.lora_B["default"].weight, None, l.scaling["default"]) for l in layers
                ]
                group.store(
                    slot,
                    start,
                    [multi.Factors(*(t.detach() if isinstance(t, Tensor) else t for t in f)) for f in factors],
                )
        batch, seen = padded(rows, "left"), calls(tenants.model)
        for slots in ((0, -1, 1, 1, 0), (1, -1, -1, 0, 1), (0, -1, 1, 1, 0)):
            with serving.serving(multi.Batch(tables, slots, ranks)):
                logits = tenants.forward(WHO, **batch).logits
            results: tuple[dict[str, Tensor], ...] = ({}, {}, {})
            for i, (row, slot, P) in enumerate(zip(rows, slots, WHO, strict=True)):
                results[0][f"row {i}"] = logits[i, -len(row) :]
                for side, model in enumerate(adapted[slot, P], 1):
                    with torch.no_grad():
                        results[side][f"row {i}"] = model(**one(row)).logits[0, -len(row) :]
            draws.append(results)
        assert seen.count(True) == 6, "a prefix for each pair of prompt and adapter"
    assert_all_close(draws)
