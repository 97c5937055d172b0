"""Where a bank keeps its adapters: runs of rows, eviction, the host's bound, replacing and deleting."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from banked import bank_of, output, prompter, state_of, take, tenant
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, logits
from peft import PeftModel
from tolerance import assert_same
from torch import nn

from fastlora import AdapterBank
from fastlora.runs import Runs
from fastlora.storage import NoRoom


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    """a to e, of rank 4; "big" of rank 9, and "biased" of rank 4 with a lora_bias."""
    made = {name: tenant(base, r=4) for name in "abcde"}
    return made | {"big": tenant(base, r=9), "biased": tenant(base, r=4, lora_bias=True)}


def where(bank: AdapterBank) -> dict[str, str]:
    return {entry.name: entry.where for entry in bank.list_adapters()}


@given(st.lists(st.integers(1, 9), max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_runs_never_overlap(sizes: list[int], chance: random.Random) -> None:
    runs, mine = Runs(32), [None] * 32
    for owner, rows in enumerate(sizes):
        start = runs.take(rows)
        longest = max((len(gap) for gap in "".join("x" if m is not None else " " for m in mine).split("x")), default=0)
        assert (start is None) == (longest < rows)
        if start is not None:
            assert all(m is None for m in mine[start : start + rows])
            mine[start : start + rows] = [owner] * rows
        if start is None or chance.random() < 0.3:
            first = chance.choice(sorted(runs.taken))
            mine[first : first + runs.taken[first]] = [None] * runs.taken[first]
            runs.give(first)
        assert runs.free == mine.count(None)
    for start, to, rows in runs.compact():
        moved = mine[start : start + rows]
        mine[start : start + rows] = [None] * rows
        assert all(m is None for m in mine[to : to + rows])
        mine[to : to + rows] = moved
    assert runs.gaps() == ([(32 - runs.free, runs.free)] if runs.free else [])
    assert all(m is not None for m in mine[: 32 - runs.free])


def test_the_least_recently_used_makes_room_and_comes_back_whole(
    base: nn.Module, tenants: dict[str, PeftModel]
) -> None:
    bank = bank_of(base)
    for name in "abcd":
        take(bank, name, tenants[name])
    before = {name: output(bank, name) for name in "bcda"}
    take(bank, "biased", tenants["biased"])
    assert where(bank) == {"a": "device", "b": "host", "c": "host", "d": "device", "biased": "device"}
    before["biased"] = output(bank, "biased")
    left = set()
    for name in ("b", "c", "a", "d", "biased", "b"):
        left |= {name for name, place in where(bank).items() if place == "host"}
        assert_same(output(bank, name), before[name])
        assert where(bank)[name] == "device"
    assert left == set(before)
    rows = {entry.name: entry.bytes for entry in bank.list_adapters()}
    assert rows["a"] == sum(t.nbytes for t in state_of(tenants["a"])[0].values()) < rows["biased"]


def test_neither_the_pinned_nor_the_used_leave(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"], pinned=True)
    for name in "bcde":
        take(bank, name, tenants[name])
    assert where(bank) == {"a": "device", "b": "host", "c": "device", "d": "device", "e": "device"}
    with bank.use(["c", "d"]):
        assert where(bank)["c"] == "device"
        with bank.use(["b"]):
            assert where(bank) == {"a": "device", "b": "device", "c": "device", "d": "device", "e": "host"}
            with pytest.raises(NoRoom, match=r"'e': .* takes 4 rank rows .* 0 are free, .* 16 are in use or pinned"):
                output(bank, "e")
            take(bank, "late", tenants["e"])
            assert where(bank)["late"] == "host"
            with pytest.raises(NoRoom):
                take(bank, "later", tenants["e"], pinned=True)
    with pytest.raises(NoRoom):
        output(bank, *"abcde")
    bank.pin_adapter("a", False)
    output(bank, "b", "c", "d", "e")
    assert where(bank)["a"] == "host"
    with pytest.raises(NoRoom, match="it takes 9 rank rows"):
        take(bank_of(base, max_total_rank=8), "big", tenants["big"])


def test_the_host_keeps_to_its_bound(
    base: nn.Module, tenants: dict[str, PeftModel], caplog: pytest.LogCaptureFixture
) -> None:
    bank = bank_of(base, max_loras=2)
    take(bank, "a", tenants["a"])
    size = bank.list_adapters()[0].bytes
    bank = bank_of(base, max_loras=2, host_bytes=2 * size)
    with caplog.at_level(logging.WARNING, "fastlora"):
        for name in "abcd":
            take(bank, name, tenants[name])
        assert not caplog.messages and list(where(bank).values()) == ["host", "host", "device", "device"]
        output(bank, "a")
        take(bank, "e", tenants["e"])
    assert where(bank) == {"a": "device", "c": "host", "d": "host", "e": "device"}
    assert "'b'" in caplog.text
    assert sum(version.bytes for version in bank._storage.host) == 2 * size
    with pytest.raises(KeyError, match="dropped from a full host cache"):
        output(bank, "b")


def test_gaps_are_closed_when_nothing_runs(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_loras=8, max_total_rank=21)
    for name in "abcd":
        take(bank, name, tenants[name], pinned=True)
    take(bank, "biased", tenants["biased"], pinned=True)
    before = {name: output(bank, name) for name in ("b", "d", "biased")}
    bank.delete_adapter("a")
    bank.delete_adapter("c")
    with bank.use(["b"]), pytest.raises(NoRoom, match="8 are free, 4 of them together"):
        take(bank, "big", tenant(base, r=8), pinned=True)
    bank.prepare([0])
    with pytest.raises(NoRoom):
        take(bank, "big", tenant(base, r=8), pinned=True)
    bank.prepare(None)
    take(bank, "big", tenant(base, r=8), pinned=True)
    assert set(where(bank).values()) == {"device"} and bank._lora.runs.free == 0
    bank._batches.clear()  # they hold factors gathered before
    for name, expected in before.items():
        assert_same(output(bank, name), expected)


def test_replacing(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """A batch keeps the version that it began with; the next one has the new, and the old one's room is free."""
    bank = bank_of(base)
    assert take(bank, "a", tenants["a"], pinned=True) == 1
    with pytest.raises(ValueError, match="replace=True"):
        take(bank, "a", tenants["b"])
    old = output(bank, "a")
    with bank.use(["a"]):
        assert take(bank, "a", tenants["b"], replace=True) == 2
        assert len(bank._lora.resident) == 2
        assert_same(logits(bank._attached.model, {"input_ids": torch.arange(3, 8)[None]}), old)
        assert not torch.equal(output(bank, "a"), old)
    assert len(bank._lora.resident) == 1
    (entry,) = bank.list_adapters()
    assert (entry.generation, entry.pinned) == (2, True)
    assert take(bank, "a", tenants["a"], replace=True) == 3
    assert_same(output(bank, "a"), old)
    bank.delete_adapter("a")
    assert take(bank, "a", tenants["a"]) == 4
    full = bank_of(base, max_loras=1, max_total_rank=4, host_bytes=0)
    take(full, "a", tenants["a"], pinned=True)
    take(full, "a", tenants["b"], replace=True)
    assert where(full) == {"a": "device"}


def test_deleting(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    old = output(bank, "a")
    with bank.use(["a"]):
        bank.delete_adapter("a")
        assert not bank.list_adapters()
        assert_same(logits(bank._attached.model, {"input_ids": torch.arange(3, 8)[None]}), old)
    assert not bank._lora.resident and bank._lora.runs.free == 16 and not bank._batches
    with pytest.raises(KeyError, match="none are loaded"):
        bank.delete_adapter("a")


def test_the_last_mixes_are_gathered_once(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    for name in "ab":
        take(bank, name, tenants[name])
    output(bank, "a", "b")
    (batch,) = bank._batches.values()
    output(bank, "a", "b")
    assert list(bank._batches.values()) == [batch]
    output(bank, "b", "a")
    assert len(bank._batches) == 2
    take(bank, "b", tenants["c"], replace=True)
    assert not bank._batches
    for names in ("a", "b", "ab", "ba", "aab", "abb"):
        output(bank, *names)
    assert len(bank._batches) == 4


def test_prompts_share_the_same_rules(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_prompts=2, max_prompt_tokens=8)
    inputs = batch(rows=1)
    outputs = {}
    for name, tokens in (("p", 5), ("q", 3), ("s", 8)):
        take(bank, name, prompter(base, tokens))
        with bank.use(prompt_names=[name]):
            outputs[name] = logits(bank._attached.model, inputs)
    assert where(bank) == {"p": "host", "q": "host", "s": "device"}
    for name, expected in outputs.items():
        with bank.use(prompt_names=[name]):
            assert_same(logits(bank._attached.model, inputs), expected)
    state, config = state_of(prompter(base, 5))
    with pytest.raises(ValueError, match=r"got shape \(5, 64\), wanted \(4, 64\)"):
        bank.load_adapter(state, "short", config={**config, "num_virtual_tokens": 4})
    with pytest.raises(NoRoom, match="9 virtual tokens"):
        take(bank, "long", prompter(base, 9))


@pytest.mark.parametrize("what", ["max_loras", "max_total_rank", "max_prompts", "max_prompt_tokens"])
def test_sizes_are_checked(what: str, base: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{what}: got 0"):
        AdapterBank(base, **{what: 0})
