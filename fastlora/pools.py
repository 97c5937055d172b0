"""The device side of a bank: rank rows of adapters in all layers, and rows of virtual tokens."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fastlora.adapters import Adapter
from fastlora.multi import Group, Tables


class Pools(Protocol):
    """Rows on the device, addressed by a slot and the first of its rows."""

    def store(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy the adapter in."""

    def clear(self, slot: int) -> None:
        """Nobody is in the slot any more."""

    def load(self, slot: int, start: int) -> Adapter:
        """The adapter, back on the CPU."""

    def move(self, slot: int, start: int, to: int, rows: int) -> None:
        """The slot's rows to another place."""

    def give(self, slot: int) -> None:
        """Mappings may name the slot from now on."""

    def take_back(self, slot: int) -> None:
        """To mappings that are looked up from now on, the slot is the base alone."""


class LayerPools:
    """Rank rows, in every group of layers.   names: the members of each group."""

    def __init__(self, tables: Tables, groups: list[Group], names: list[list[str]]) -> None:
        self.tables = tables
        self.groups = list(zip(groups, names, strict=True))

    def store(self, slot: int, start: int, adapter: Adapter) -> None:
        _settle(self.tables.start)
        for group, names in self.groups:
            group.store(slot, start, [adapter.factors.get(name) for name in names])
        self.tables.hold(slot, start, adapter.rank)
        _settle(self.tables.start)

    def clear(self, slot: int) -> None:
        _settle(self.tables.start)
        for group, _ in self.groups:
            group.clear(slot)
        self.tables.hold(slot, 0, 0)
        self.tables.take_back(slot)

    def load(self, slot: int, start: int) -> Adapter:
        found = ((names, group.read(slot, start)) for group, names in self.groups)
        return Adapter.lora(
            {n: f for names, parts in found for n, f in zip(names, parts, strict=True) if f is not None}
        )

    def move(self, slot: int, start: int, to: int, rows: int) -> None:
        _settle(self.tables.start)
        for group, _ in self.groups:
            group.move(start, to, rows)
        self.tables.hold(slot, to, self.tables.widest[slot])
        _settle(self.tables.start)

    def give(self, slot: int) -> None:
        self.tables.give(slot)
        _settle(self.tables.start)

    def take_back(self, slot: int) -> None:
        self.tables.take_back(slot)
        _settle(self.tables.start)


class PromptPools:
    """Virtual tokens, in a `fastlora.prompts.Prompts`; they are few, and stay on the host besides."""

    def __init__(self, prompts: Any) -> None:
        self.prompts = prompts
        self._kept: dict[int, Adapter] = {}

    def store(self, slot: int, start: int, adapter: Adapter) -> None:
        self.prompts.store(slot, start, adapter.prompt, adapter.decoder_prompt)
        self._kept[slot] = adapter

    def clear(self, slot: int) -> None:
        self.prompts.clear(slot)
        self._kept.pop(slot, None)

    def load(self, slot: int, start: int) -> Adapter:
        return self._kept[slot]

    def move(self, slot: int, start: int, to: int, rows: int) -> None:
        self.store(slot, to, self._kept[slot])

    def give(self, slot: int) -> None:
        raise NotImplementedError("a mapping names no soft prompts")

    def take_back(self, slot: int) -> None:
        raise NotImplementedError("a mapping names no soft prompts")


def _settle(t: torch.Tensor) -> None:
    """Rows change hands only when no kernel, on whatever stream, still reads or writes them."""
    if t.is_cuda:
        torch.cuda.synchronize(t.device)
