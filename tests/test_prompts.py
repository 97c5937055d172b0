"""Soft prompts by request: each row of a mixed batch is that row alone, unpadded, in PEFT's prompt tuning."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, base_model, lora_config
from peft import PromptTuningConfig, get_peft_model, inject_adapter_in_model
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn

from fastlora import multi
from fastlora.prompts import PromptOf, Prompts

LENGTHS = (1, 5, 20)
WHO = (1, 0, 20, 5, 0)
"""The batch's requests by the length of their prompt."""
CAUSAL = ("llama", "qwen3", "gpt2")
FAMILIES = (*CAUSAL, "t5", "bart")


def small(family: str) -> transformers.PreTrainedModel:
    """A model of the family whose weights are large enough for its tokens to depend on what it reads."""
    if family == "bart":
        sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, dropout=0)
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
        config = transformers.BartConfig(vocab_size=VOCABULARY, **ids, **sizes, **heads)
        model = transformers.BartForConditionalGeneration(config).eval()
    else:
        model = base_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (family != "t5" or "EncDecAttention.o" in name):
                parameter.mul_(5)
    return model


def with_prompt(base: nn.Module, rows: Tensor, family: str) -> nn.Module:
    """PEFT's prompt tuning around the base, with these virtual tokens."""
    task = "CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM"
    model = get_peft_model(base, PromptTuningConfig(task_type=task, num_virtual_tokens=len(rows)))
    weight = model.prompt_encoder["default"].embedding.weight.data
    weight.normal_()  # a decoder's half, if there is one
    weight[: len(rows)] = rows
    return model.eval()


@dataclass
class Tenants:
    """A served model, its prompts by length, and for each length what PEFT would run: in fp32, and in float64."""

    family: str
    model: Any
    prompts: Prompts
    requests: dict[int, PromptOf | None]
    plain: dict[int, Any]
    exact: dict[int, Any]

    @classmethod
    def of(cls, family: str, seed: int = 0) -> Tenants:
        torch.manual_seed(seed)
        model = small(family)
        weight = model.get_input_embeddings().weight
        pool = {P: torch.randn(P, weight.shape[1]) * weight.std() for P in LENGTHS}
        plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        prompts = Prompts(model, max_prompts=4, max_tokens=32)
        requests: dict[int, PromptOf | None] = {0: None}
        for slot, (P, rows) in enumerate(pool.items()):
            requests[P] = PromptOf(slot, start=sum(LENGTHS[:slot]), tokens=P, version=(slot, 0))
            prompts.store(slot, sum(LENGTHS[:slot]), rows)
        peft = {P: with_prompt(plain, rows, family) for P, rows in pool.items()}
        doubled = {P: with_prompt(exact, rows.double(), family).double() for P, rows in pool.items()}
        return cls(family, model, prompts, requests, {0: plain, **peft}, {0: exact, **doubled})

    @property
    def causal(self) -> bool:
        return self.family in CAUSAL

    def serving(self, who: Sequence[int] = WHO) -> Any:
        return self.prompts.serving([self.requests[P] for P in who])

    def forward(self, who: Sequence[int], **inputs: Any) -> Any:
        with torch.no_grad(), self.serving(who):
            return self.model(**inputs)

    def generate(self, who: Sequence[int], **inputs: Any) -> Tensor:
        with self.serving(who):
            return self.model.generate(**inputs)


@pytest.fixture(scope="module", params=FAMILIES)
def tenants(request: pytest.FixtureRequest) -> Tenants:
    return Tenants.of(request.param)


@pytest.fixture
def llama() -> Iterator[Tenants]:
    tenants = Tenants.of("llama")
    yield tenants
    tenants.prompts.close()


def rows_of(lengths: Sequence[int] = (5, 3, 7, 4, 6)) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (length,)) for length in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def one(row: Tensor) -> dict[str, Tensor]:
    return padded([row], "left")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
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
        alone = tenants.plain[P].generate(**one(row), **options, use_cache=True)
        assert_same(tokens[i * each : (i + 1) * each, -6:], alone[:, -6:])
    unprompted = tenants.generate((0,) * 5, **batch, **options, use_cache=use_cache)
    changed = (tokens != unprompted).any(1).view(-1, each).any(1)
    assert changed[[1, 4]].sum() == 0 and changed[[0, 2, 3]].sum() > 1, "the prompts changed hardly anything"


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


def test_given_positions_are_shifted_by_each_rows_own_prompt() -> None:
    tenants, batch = Tenants.of("gpt2"), padded(rows_of(), "left")
    own = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    implied, given, moved = (
        tenants.forward(WHO, **batch, **p).logits for p in ({}, {"position_ids": own}, {"position_ids": own + 1})
    )
    assert_same(given, implied)
    assert not moved.equal(implied)


def calls(model: nn.Module) -> list[int]:
    """Grows with each run of the model's body: True where that was a prefix's, whose tokens are all attended to."""
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"] is None), with_kwargs=True
    )
    return seen


def test_a_prefix_is_computed_once_and_again_for_a_new_version(llama: Tenants) -> None:
    batch, seen = padded(rows_of(), "left"), calls(llama.model)
    first = llama.forward(WHO, **batch).logits
    assert seen == [True] * 3 + [False]
    for _ in range(2):
        assert_same(llama.forward(WHO, **batch).logits, first)
    llama.generate((20, 20, 1, 20, 5), **batch, max_new_tokens=2, use_cache=True)
    assert seen.count(True) == 3
    llama.prompts.pool[:1] *= 2  # the prompt of one token
    assert_same(llama.forward(WHO, **batch).logits, first)
    llama.requests[1] = PromptOf(0, 0, 1, (7, 0))
    renewed = llama.forward(WHO, **batch).logits
    assert seen.count(True) == 4
    assert_same(renewed[1:], first[1:])
    assert not renewed[0].equal(first[0])
    llama.prompts.clear(0)
    llama.forward(WHO, **batch)
    assert seen.count(True) == 5


def test_no_more_prefixes_are_kept_than_there_is_room_for(llama: Tenants) -> None:
    llama.prompts.kept_tokens = 21
    batch, seen = padded(rows_of((4,)), "left"), calls(llama.model)
    for P, computed in ((20, 1), (1, 2), (20, 2), (5, 3), (5, 3), (1, 4), (20, 5)):
        llama.forward((P,), **batch)
        assert seen.count(True) == computed, f"after the prompt of {P} tokens"


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
                tables.start[slot] = start
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
            with multi.serving(multi.Batch(tables, slots, ranks)):
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


def test_outside_and_after_an_error_the_model_is_its_base(tenants: Tenants) -> None:
    batch = padded(rows_of(), "left")
    batch |= {} if tenants.causal else {"decoder_input_ids": batch["input_ids"][:, :2]}
    with torch.no_grad():
        base = tenants.plain[0](**batch).logits
        with pytest.raises(RuntimeError, match="halfway"), tenants.serving():
            tenants.model(**batch)
            with tenants.prompts.serving([None] * 5):
                assert_same(tenants.model(**batch).logits, base)
            raise RuntimeError("halfway")
        assert_same(tenants.model(**batch).logits, base)


def test_a_failing_prefix_leaves_nothing_behind(llama: Tenants) -> None:
    batch = padded(rows_of(), "left")
    want = Tenants.of("llama").forward(WHO, **batch).logits
    last = llama.model.model.layers[-1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama.forward(WHO, **batch)
    handle.remove()
    assert_same(llama.forward(WHO, **batch).logits, want)


def test_threads_have_prompts_of_their_own(llama: Tenants) -> None:
    batch, whose = padded(rows_of(), "left"), [WHO, (0, 5, 5, 1, 20)]
    want = [Tenants.of("llama").generate(who, **batch, max_new_tokens=6, use_cache=True) for who in whose]
    assert not want[0].equal(want[1])
    meet, wrong = threading.Barrier(2), []

    def tenant(who: Sequence[int], expected: Tensor) -> None:
        for _ in range(4):
            meet.wait(30)
            if not llama.generate(who, **batch, max_new_tokens=6, use_cache=True).equal(expected):
                wrong.append(who)

    threads = [threading.Thread(target=tenant, args=args) for args in zip(whose, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and meet.n_waiting == 0


def test_closing_gives_the_methods_back(tenants: Tenants) -> None:
    model = small(tenants.family)
    prompts = Prompts(model, 1, 1)
    assert "forward" in vars(model)
    prompts.close()
    assert not {"forward", "generate"} & (vars(model).keys() | vars(model.get_encoder()).keys())


def test_bad_input_is_refused(llama: Tenants) -> None:
    batch, d = padded(rows_of(), "left"), llama.prompts.pool.shape[1]
    for match, call in {
        "rows: got": lambda: llama.prompts.store(0, 0, torch.ones(2, d + 1)),
        "decoder_rows: got": lambda: llama.prompts.store(0, 0, torch.ones(2, d), torch.ones(3, d)),
        "slot: got 4": lambda: llama.prompts.store(4, 0, torch.ones(2, d)),
        "start: got 31": lambda: llama.prompts.store(0, 31, torch.ones(2, d)),
        "input_ids: got 5 rows": lambda: llama.forward((1, 5), **batch),
        "input_ids: got neither": lambda: llama.forward((1,), attention_mask=batch["attention_mask"]),
        "attention_mask: got": lambda: llama.forward(
            WHO, input_ids=batch["input_ids"], attention_mask=torch.ones(5, 8)
        ),
        "position_ids: got": lambda: llama.forward(WHO, **batch, position_ids=torch.ones(3, 5, 7, dtype=torch.long)),
        "StaticCache": lambda: llama.generate(WHO, **batch, cache_implementation="static", use_cache=True),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    begun = llama.forward(WHO, **batch, use_cache=True).past_key_values
    foreign = llama.forward((0,) * 5, **batch, use_cache=True).past_key_values
    longer = torch.ones(5, 8, dtype=torch.long)
    step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": longer}
    for who, cache in (((0,) * 5, begun), ((1, 0, 5, 20, 0), begun), (WHO, foreign)):
        with pytest.raises(ValueError, match="past_key_values: got a cache"):
            llama.forward(who, **step, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: got a cache that holds"):
        llama.generate(WHO, input_ids=torch.ones_like(longer), past_key_values=begun)
    with (
        pytest.raises(ValueError, match="requests: got 5"),
        multi.serving(multi.Batch(multi.Tables.empty(1, 1, torch.device("cpu")), [0, 0], {0: 1})),
    ):
        llama.forward(WHO, **batch)


def test_models_without_a_plain_cache_are_refused() -> None:
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(**sizes, num_key_value_heads=1, sliding_window=4)
    )
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1))
    for model, what in ((mistral, "DynamicSlidingWindowLayer"), (mamba, "past_key_values: got")):
        prompts = Prompts(model, 1, 2)
        prompts.store(0, 0, torch.ones(2, 16))
        with pytest.raises(ValueError, match=what), prompts.serving([PromptOf(0, 0, 2, (0,))]):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="model: got BertForMaskedLM"):
        Prompts(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)), 1, 2)
