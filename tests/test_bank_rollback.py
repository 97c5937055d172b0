"""What fails changes nothing: a store that raises at any of its steps, too little room, a closed bank."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from banked import bank_of, model_of, output, prompter, state_of, take, tenant
from models import logits
from peft import PeftModel
from tolerance import assert_same
from torch import nn

from fastlora import AdapterBank
from fastlora.storage import NoRoom


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    return {name: tenant(base, r=4) for name in "abcd"} | {"big": tenant(base, r=8)}


def books(bank: AdapterBank) -> Any:
    shelf, tables = bank._lora, bank._attached.tables
    places = {v.name: (v.generation, v.slot, v.start, v.given, v.current, v.users) for v in bank._versions.values()}
    resident = {v.name for v in shelf.resident}
    waiting = {v.name for v in bank._storage.host}
    taken = sorted(shelf.runs.taken.items())
    ranks = [[ranks[:] for ranks in group.ranks] for group in bank._attached.groups]
    device = [tables.given.tolist(), *(group.rank.tolist() for group in bank._attached.groups)]
    held = {v.slot: tables.start[v.slot].item() for v in shelf.resident}
    return (
        bank.list_adapters(),
        places,
        resident,
        waiting,
        taken,
        list(shelf.free),
        list(tables.widest),
        ranks,
        device,
        held,
    )


class Failing:
    """A call in the place of another, which raises the n-th time that any of its kind is called."""

    def __init__(self, at: int) -> None:
        self.left, self.raised = at, False

    def around(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                self.raised = True
                raise MemoryError("injected")
            return inner(*args)

        return call


def fails_everywhere(bank: AdapterBank, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Let `act` fail at each step in turn, comparing before with after.   Returns how many steps there were."""
    before = books(bank)
    for at in itertools.count():
        failing = Failing(at)
        with monkeypatch.context() as patch:
            for group in bank._attached.groups:
                for step in ("store", "clear", "read", "move"):
                    patch.setattr(group, step, failing.around(getattr(group, step)))
            for step in ("hold", "take_back"):
                patch.setattr(bank._attached.tables, step, failing.around(getattr(bank._attached.tables, step)))
            try:
                act()
            except MemoryError:
                assert books(bank) == before, f"step {at}"
                continue
        assert not failing.raised
        return at
    raise AssertionError


def full(bank: AdapterBank) -> None:
    """The two used least make room."""


def half_empty(bank: AdapterBank) -> None:
    bank.delete_adapter("a")
    bank.delete_adapter("b")


def all_pinned(bank: AdapterBank) -> None:
    """Room is the old version's alone; it has a number, and others have."""
    for name in "abcd":
        bank.slot(name)


def gapped(bank: AdapterBank) -> None:
    """Eight rows are free, four of them together, and what lies between them has numbers."""
    bank.slot("b")
    bank.slot("d")
    bank.delete_adapter("a")
    bank.delete_adapter("c")


@pytest.mark.parametrize(
    ("begin", "name", "adapter"),
    [
        (half_empty, "new", "big"),
        (full, "new", "big"),
        (full, "d", "a"),
        (all_pinned, "d", "a"),
        (gapped, "new", "big"),
    ],
)
def test_a_store_that_fails_leaves_the_bank_as_it_was(
    begin: Callable[[AdapterBank], None],
    name: str,
    adapter: str,
    base: nn.Module,
    tenants: dict[str, PeftModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whichever step: the books, and at the end what everybody computes."""
    bank = bank_of(base)
    for known in "abcd":
        take(bank, known, tenants[known])
    expected = {known: output(bank, known) for known in "abcd"}
    begin(bank)
    state, config = state_of(tenants[adapter])
    load = functools.partial(bank.load_adapter, state, name, config=config, replace=True)
    assert fails_everywhere(bank, load, monkeypatch) > 8
    others = [entry.name for entry in bank.list_adapters() if entry.name != name]
    bank._batches.clear()  # they hold factors gathered before
    for other in others:
        assert_same(output(bank, other), expected[other])
    alone = bank_of(base)
    take(alone, name, tenants[adapter])
    assert_same(output(bank, name), output(alone, name))


def test_bringing_back_is_all_or_nothing_too(
    base: nn.Module, tenants: dict[str, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(base, max_loras=2, max_total_rank=8)
    for name in "abcd":
        take(bank, name, tenants[name])
    expected = {name: output(bank, name) for name in "abcd"}

    def use() -> None:
        with bank.use(["a", "b"]):
            pass

    assert fails_everywhere(bank, use, monkeypatch) > 8
    for name, wanted in expected.items():
        bank._batches.clear()
        assert_same(output(bank, name), wanted)


@pytest.mark.parametrize("alpha", [1e40, -1e40, 10**400], ids=["1e40", "-1e40", "10**400"])
def test_a_scaling_beyond_fp32_is_refused(alpha: float, base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"], pinned=True)
    before = books(bank)
    state, config = state_of(tenants["b"])
    for name in "ab":
        with pytest.raises(ValueError, match=f"adapter '{name}': got .*fp32"):
            bank.load_adapter(state, name, config={**config, "lora_alpha": alpha}, replace=True)
    assert books(bank) == before


def test_a_batch_without_room_evicts_nobody(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_loras=2, max_total_rank=8)
    for name in "abc":
        take(bank, name, tenants[name])
    take(bank, "pinned", tenants["d"], pinned=True)
    take(bank, "p", prompter(base, 3))
    before = books(bank)
    with pytest.raises(NoRoom, match=r"'[ab]': too little room"), bank.use(["a", "b"]):
        pass
    with pytest.raises(NoRoom), bank.use(["a", "b"], ["p", None]):
        pass
    assert books(bank) == before


def test_a_bank_in_use_does_not_close(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    for names in (["a"], [None]):
        with bank.use(names):
            with pytest.raises(RuntimeError, match="got 1 batches that are in use"):
                bank.close()
            alone = logits(model_of(bank), {"input_ids": torch.arange(3, 8)[None]})
        assert_same(alone, output(bank, *names))
    bank.close()
    bank.close()


def test_a_closed_bank_says_so(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    bank.close()
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: take(bank, "b", tenants["b"]),
        "delete": lambda: bank.delete_adapter("a"),
        "pin": lambda: bank.pin_adapter("a"),
        "list": bank.list_adapters,
        "slot": lambda: bank.slot("a"),
        "slot of nobody": lambda: bank.slot(None),
        "use": lambda: bank.use(["a"]).__enter__(),
        "prepare": lambda: bank.prepare([-1]),
        "prepare nothing": lambda: bank.prepare(None),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="the bank is closed"):
            call()


@pytest.mark.parametrize("names", [5, "a", {"a"}, iter(["a"]), [1], [b"a"]], ids=lambda names: type(names).__name__)
def test_what_is_no_list_of_names(names: Any, base: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"adapter_names: got .*, wanted a list of names"), bank_of(base).use(names):
        pass
