"""Loading, evicting, replacing and deleting beside threads that generate: nothing wrong, nothing leaks, no deadlock."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from banked import state_of, tenant
from models import base_model, logits
from tolerance import relative_error
from torch import Tensor

from fastlora import AdapterBank
from fastlora.storage import NoRoom, UnknownAdapter, Version

NAMES = "abcdef"
IDS = torch.arange(3, 8)[None]


class Tenants:
    """Two versions of each adapter, and what each of them computes for IDS."""

    def __init__(self) -> None:
        base = base_model(layers=1)
        self.base = base
        self.states: dict[tuple[str, int], tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self.outputs = {(None, 0): logits(base, {"input_ids": IDS})[0]}
        for name in NAMES:
            for version in (0, 1):
                model = tenant(base, r=1 + NAMES.index(name), lora_bias=name == "c")
                self.states[name, version] = state_of(model)
                self.outputs[name, version] = logits(model, {"input_ids": IDS})[0]

    def which(self, name: str | None, output: Tensor) -> int | None:
        """The version of the adapter that has computed the output; None when none has."""
        found = [v for n, v in self.outputs if n == name and relative_error(output, self.outputs[n, v].double()) < 1e-5]
        return found[0] if len(found) == 1 else None


class Generating(threading.Thread):
    """Mixed batches until told to stop.   wrong: what must not happen.   served, refused: how many batches."""

    def __init__(self, bank: AdapterBank, tenants: Tenants, seed: int) -> None:
        super().__init__(daemon=True)
        self.bank, self.tenants, self.chance = bank, tenants, random.Random(seed)
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.served = self.refused = 0

    def run(self) -> None:
        while not self.stop.is_set():
            names = self.chance.choices([*NAMES, None], k=self.chance.randint(1, 4))
            try:
                self.serve(names + names[:1])
            except (UnknownAdapter, NoRoom):
                self.refused += 1
            except BaseException as error:
                self.wrong.append(repr(error))
                return

    def serve(self, names: list[str | None]) -> None:
        """One batch of a few calls: every row is one version of its own adapter, the same in all rows and calls."""
        with self.bank.use(names):
            seen: dict[str | None, int | None] = {}
            for _ in range(2):
                output = logits(self.bank._attached.model, {"input_ids": IDS.expand(len(names), -1)})
                for name, row in zip(names, output, strict=True):
                    version = self.tenants.which(name, row)
                    if version is None or seen.setdefault(name, version) != version:
                        self.wrong.append(f"{names}: {name!r} is version {version}, seen {seen}")
        self.served += 1


def churn(bank: AdapterBank, tenants: Tenants, chance: random.Random) -> None:
    """One change of the bank."""
    name = chance.choice(NAMES)
    known = {entry.name for entry in bank.list_adapters()}
    what = chance.random()
    try:
        if name not in known or what < 0.5:
            state, config = tenants.states[name, chance.randint(0, 1)]
            bank.load_adapter(state, name, config=config, replace=True, pinned=chance.random() < 0.1)
        elif what < 0.7:
            bank.delete_adapter(name)
        elif what < 0.8:
            bank.pin_adapter(name, chance.random() < 0.3)
        else:
            with bank.use([name]):
                pass
    except NoRoom:
        for entry in bank.list_adapters():
            if entry.pinned:
                bank.pin_adapter(entry.name, False)


def survive(cycles: int, seconds: float) -> None:
    tenants = Tenants()
    bank = AdapterBank(copy.deepcopy(tenants.base), max_loras=4, max_total_rank=14, host_bytes=60_000)
    threads = [Generating(bank, tenants, seed) for seed in range(3)]
    for thread in threads:
        thread.start()
    chance, deadline, places, generations = random.Random(0), time.monotonic() + seconds, set(), []
    versions: weakref.WeakSet[Version] = weakref.WeakSet()
    for _ in range(cycles):
        churn(bank, tenants, chance)
        time.sleep(0.002)
        versions.update(bank._versions.values())
        entries = bank.list_adapters()
        places |= {entry.where for entry in entries}
        generations.append(max((entry.generation for entry in entries), default=0))
        assert time.monotonic() < deadline, "too slow, or stuck"
        assert all(thread.is_alive() for thread in threads), [thread.wrong for thread in threads]
    for thread in threads:
        thread.stop.set()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "deadlock"
        assert not thread.wrong, thread.wrong[:3]
    assert min(thread.served for thread in threads) > cycles // 20, "the test must have served"
    assert places == {"device", "host"} and max(generations) > cycles // 4
    for entry in bank.list_adapters():
        bank.delete_adapter(entry.name)
    shelf = bank._lora
    assert not shelf.resident and not bank._storage.host and not bank._batches and not bank._versions
    assert shelf.runs.free == shelf.rows and sorted(shelf.free) == list(range(shelf.slots))
    assert bank._attached.tables.widest == [0] * shelf.slots
    assert all(int(group.rank.abs().sum()) == 0 for group in bank._attached.groups)
    gc.collect()
    assert not versions, "a version is never let go"


def test_cycles_beside_generating_threads() -> None:
    survive(500, seconds=60)


@pytest.mark.slow
def test_many_cycles_beside_generating_threads() -> None:
    survive(10_000, seconds=1200)


def test_threads_have_batches_of_their_own() -> None:
    """What one thread uses or prepares is no other's."""
    tenants = Tenants()
    bank = AdapterBank(copy.deepcopy(tenants.base))
    for name in "ab":
        state, config = tenants.states[name, 0]
        bank.load_adapter(state, name, config=config)
    barrier, seen = threading.Barrier(3, timeout=30), {}

    def serve(name: str | None) -> None:
        def forward() -> int | None:
            barrier.wait()
            return tenants.which(name, logits(bank._attached.model, {"input_ids": IDS})[0])

        if name is None:
            seen[name] = [forward(), forward()]
        elif name == "a":
            with bank.use([name]):
                seen[name] = [forward(), forward()]
        else:
            bank.prepare([bank.slot(name)] * 5)
            seen[name] = [forward(), forward()]

    threads = [threading.Thread(target=serve, args=(name,), daemon=True) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert seen == {"a": [0, 0], "b": [0, 0], None: [0, 0]}
    gc.collect()
    assert not bank._lora.standing, "a thread that has ended holds nothing"
