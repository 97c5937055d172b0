"""What soft prompts keep: prefixes and caches, what threads and errors leave, what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from tenants import FAMILIES, WHO, Tenants, calls, padded, rows_of, small
from tolerance import assert_same
from torch import Tensor

from fastlora import multi, serving
from fastlora.prompts import PromptOf, Prompts, named
from fastlora.virtual import cache_key


@pytest.fixture(scope="module", params=FAMILIES)
def tenants(request: pytest.FixtureRequest) -> Tenants:
    return Tenants.of(request.param)


@pytest.fixture
def llama() -> Iterator[Tenants]:
    tenants = Tenants.of("llama")
    yield tenants
    tenants.prompts.close()


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


def test_a_slow_prefix_is_waited_for_by_nobody_else(llama: Tenants) -> None:
    batch, seen = padded(rows_of((4,)), "left"), calls(llama.model)
    want = {P: Tenants.of("llama").forward((P,), **batch).logits for P in (1, 5)}
    llama.forward((1,), **batch)
    slow, begun, on = threading.local(), threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        if getattr(slow, "first", False):
            slow.first = False
            begun.set()
            assert on.wait(30)

    llama.model.model.layers[0].register_forward_pre_hook(hold)
    found: dict[str, Tensor] = {}

    def ask(who: str, P: int) -> None:
        slow.first = who == "computes"
        found[who] = llama.forward((P,), **batch).logits

    computes, same = (threading.Thread(target=ask, args=(who, 5)) for who in ("computes", "asks for the same"))
    computes.start()
    assert begun.wait(30)
    same.start()
    other = threading.Thread(target=ask, args=("asks for another", 1))
    other.start()
    other.join(30)
    assert_same(found["asks for another"], want[1])
    assert not other.is_alive() and computes.is_alive() and same.is_alive()
    on.set()
    for thread in (computes, same):
        thread.join(30)
    assert_same(found["computes"], want[5])
    assert_same(found["asks for the same"], want[5])
    assert seen.count(True) == 2, "one computation of each prefix"


def test_who_waits_for_a_prefix_that_fails_computes_it_again(llama: Tenants) -> None:
    batch = padded(rows_of((4,)), "left")
    want = Tenants.of("llama").forward((5,), **batch).logits
    begun, on, failed = threading.Event(), threading.Event(), []

    def fail_once(*_: object) -> None:
        if not begun.is_set():
            begun.set()
            assert on.wait(30)
            raise ZeroDivisionError

    llama.model.model.layers[-1].register_forward_pre_hook(fail_once)
    found: list[Tensor] = []

    def ask() -> None:
        try:
            found.append(llama.forward((5,), **batch).logits)
        except ZeroDivisionError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    on.set()
    for thread in threads:
        thread.join(30)
    assert len(failed) == len(found) == 1
    assert_same(found[0], want)


def test_autocast_has_prefixes_of_its_own(llama: Tenants) -> None:
    batch, seen = padded(rows_of(), "left"), calls(llama.model)
    full = llama.forward(WHO, **batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        half = llama.forward(WHO, **batch).logits
    assert half.dtype == torch.bfloat16 and seen.count(True) == 6
    assert_same(llama.forward(WHO, **batch).logits, full)


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


def test_a_loss_of_the_last_logits_alone(llama: Tenants) -> None:
    """None of them stands before a first token, which the last virtual one would predict."""
    ids = torch.stack(rows_of([6] * len(WHO)))
    last = llama.forward(WHO, input_ids=ids, logits_to_keep=3, labels=ids[:, -3:])
    logits = llama.forward(WHO, input_ids=ids).logits[:, -3:]
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, -2:].flatten())
    torch.testing.assert_close(last.loss, wanted)


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
    llama.model.train()
    with pytest.raises(ValueError, match="training mode"):
        llama.forward(WHO, **batch)
    llama.model.eval()
    begun = llama.forward(WHO, **batch, use_cache=True).past_key_values
    emptied = copy.deepcopy(begun)
    for layer in emptied.layers:
        layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
    assert_same(llama.forward(WHO, **batch, past_key_values=emptied).logits, llama.forward(WHO, **batch).logits)
    foreign = llama.forward((0,) * 5, **batch, use_cache=True).past_key_values
    longer = torch.ones(5, 8, dtype=torch.long)
    step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": longer}
    for who, cache in (((0,) * 5, begun), ((1, 0, 5, 20, 0), begun), (WHO, foreign)):
        with pytest.raises(ValueError, match="cache: got one"):
            llama.forward(who, **step, past_key_values=cache)
    with pytest.raises(ValueError, match="cache: got one that holds"):
        llama.generate(WHO, input_ids=torch.ones_like(longer), past_key_values=begun)
    with (
        pytest.raises(ValueError, match="requests: got 5"),
        serving.serving(multi.Batch(multi.Tables.empty(1, 1, torch.device("cpu")), [0, 0], {0: 1})),
    ):
        llama.forward(WHO, **batch)


def test_a_cache_goes_by_the_name_that_the_forward_has() -> None:
    """transformers 5.24 renamed it, and still takes the old name."""

    def newer(input_ids: int, cache: int | None = None) -> None: ...

    def older(input_ids: int, past_key_values: int | None = None) -> None: ...

    assert (cache_key(newer), cache_key(older)) == ("cache", "past_key_values")
    assert named(newer, (1,), {"past_key_values": 2}) == {"input_ids": 1, "cache": 2}
    assert named(newer, (1, 2), {}) == {"input_ids": 1, "cache": 2}
    assert named(older, (1,), {"past_key_values": 2}) == {"input_ids": 1, "past_key_values": 2}


def test_models_without_a_plain_cache_are_refused() -> None:
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(**sizes, num_key_value_heads=1, sliding_window=4)
    )
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1))
    for model, what in ((mistral, "DynamicSlidingWindowLayer"), (mamba, "cache: got")):
        prompts = Prompts(model.eval(), 1, 2)
        prompts.store(0, 0, torch.ones(2, 16))
        with pytest.raises(ValueError, match=what), prompts.serving([PromptOf(0, 0, 2, (0,))]):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="model: got BertForMaskedLM"):
        Prompts(transformers.BertForMaskedLM(transformers.BertConfig(**sizes)), 1, 2)
