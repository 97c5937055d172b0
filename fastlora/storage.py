"""Where adapters live: on the device in runs of rows, or on the host while others need the room."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fastlora.adapters import Adapter
from fastlora.pools import Pools
from fastlora.runs import Runs

log = logging.getLogger("fastlora")


@dataclass(frozen=True)
class Listing:
    """One adapter of a bank.

    kind: "lora" or "prompt".   rank: the largest over all layers, 0 for a prompt.   tokens: virtual tokens, 0 for LoRA.
    bytes: in the bank's dtype.   where: "device" or "host".   generation: of this load, unique in the bank.
    """

    name: str
    kind: str
    rank: int
    tokens: int
    bytes: int
    where: str
    generation: int
    pinned: bool


@dataclass(eq=False)
class Version:
    """One load of an adapter.   What it computes never changes; where it lives does.

    rows: rank rows or virtual tokens in a pool.   waiting: its factors, while on the host.   slot, start: its place,
    while on the device.   given: its slot's number was given out, for mappings.   users: batches that run with it.
    current: not yet replaced or deleted.
    """

    name: str
    generation: int
    kind: str
    rank: int
    rows: int
    bytes: int
    pinned: bool = False
    waiting: Adapter | None = None
    slot: int = -1
    start: int = -1
    given: bool = False
    users: int = 0
    current: bool = True
    used: int = 0

    @property
    def on_device(self) -> bool:
        return self.slot >= 0

    def listing(self) -> Listing:
        tokens, where = self.rows if self.kind == "prompt" else 0, "device" if self.on_device else "host"
        return Listing(self.name, self.kind, self.rank, tokens, self.bytes, where, self.generation, self.pinned)


class UnknownAdapter(KeyError, ValueError):
    """A name that the bank does not know."""

    __str__ = ValueError.__str__


class NoRoom(RuntimeError):
    """Too little room, with the numbers."""


@dataclass
class Shelf:
    """The device's room for one kind.   what: its rows' name.   standing: prepared mappings, which run at any time, and
    the versions that each of them may serve."""

    what: str
    pools: Pools
    slots: int
    rows: int
    resident: list[Version] = field(default_factory=list)
    standing: weakref.WeakKeyDictionary[object, Collection[Version]] = field(default_factory=weakref.WeakKeyDictionary)

    def __post_init__(self) -> None:
        self.runs = Runs(self.rows)
        self.free = deque(range(self.slots))  # the longest free first, so that a stale number meets nobody for long

    def idle(self) -> bool:
        """Whether nothing runs with these rows."""
        return not self.standing and not any(version.users for version in self.resident)

    def busy(self, version: Version) -> bool:
        """Whether a batch runs with it, or a mapping stands on it."""
        return bool(version.users) or any(version in held for held in self.standing.values())

    def victims(
        self, sizes: Sequence[int], keep: Collection[Version], spare: Version | None = None
    ) -> list[Version] | None:
        """Who must leave for so many rows each, the least recently used first; None where even that is too little.

        keep: who must stay.   spare: who may leave whatever is said of it.
        """
        runs, slots, gone = self.runs.copy(), len(self.free), []
        leave = [v for v in self.resident if not (self.busy(v) or v.pinned or v in keep or v is spare)]
        leave.sort(key=lambda v: v.used, reverse=True)
        if spare is not None and spare in self.resident:
            leave.append(spare)
        while not self._fits(runs, slots, sizes):
            if not leave:
                return None
            gone.append(leave.pop())
            runs.give(gone[-1].start)
            slots += 1
        return gone

    def _fits(self, runs: Runs, slots: int, sizes: Sequence[int]) -> bool:
        if slots < len(sizes):
            return False
        if self.idle():  # gaps can be closed
            return runs.free >= sum(sizes)
        trial = runs.copy()
        return all(trial.take(rows) is not None for rows in sizes)

    def no_room(self, version: Version, keep: Collection[Version]) -> NoRoom:
        busy = sum(v.rows for v in self.resident if self.busy(v) or v.pinned or v in keep)
        gap = max((length for _, length in self.runs.gaps()), default=0)
        return NoRoom(
            f"{version.name!r}: too little room on the device: it takes {version.rows} {self.what} and a slot; of "
            f"{self.rows} {self.what}, {self.runs.free} are free, {gap} of them together, and {busy} are in use or "
            f"pinned; of {self.slots} slots, {len(self.free)} are free"
        )

    def put(self, arriving: list[tuple[Version, Adapter]], victims: list[Version]) -> dict[Version, Adapter]:
        """Store them in the place of the victims, who were chosen for their sizes.   Returns what the victims were.

        Whatever raises in between, the shelf is as it was.
        """
        after = self.runs.copy()
        for victim in victims:
            after.give(victim.start)
        tight = any(after.take(version.rows) is None for version, _ in arriving)  # gaps must be closed
        moving = [v for v in self.resident if tight and v not in victims]
        copies = {v: self.pools.load(v.slot, v.start) for v in (*victims, *moving)}
        places = [(v, v.slot, v.start, v.given) for v in self.resident]
        books = self.runs.copy(), self.free.copy(), self.resident.copy()
        try:
            for victim in victims:
                self.remove(victim)
            for version, adapter in arriving:
                self._place(version, adapter)
        except BaseException:
            for version, _ in arriving:
                if version.on_device:
                    self.pools.clear(version.slot)
                    version.slot = version.start = -1
            self.runs, self.free, self.resident = books
            for version, slot, start, given in places:
                version.slot, version.start, version.given = slot, start, given
                if version in copies:
                    self.pools.clear(version.slot)
                    self.pools.store(version.slot, version.start, copies[version])
                if version.given:
                    self.pools.give(version.slot)
            raise
        return {victim: copies[victim] for victim in victims}

    def _place(self, version: Version, adapter: Adapter) -> None:
        start = self.runs.take(version.rows)
        if start is None:
            self.compact()
            start = self.runs.take(version.rows)
        assert start is not None
        version.slot, version.start = self.free.popleft(), start
        self.resident.append(version)
        self.pools.store(version.slot, start, adapter)

    def remove(self, version: Version) -> None:
        self.pools.clear(version.slot)
        self.runs.give(version.start)
        self.free.append(version.slot)
        self.resident.remove(version)
        version.slot, version.start, version.given = -1, -1, False

    def sweep(self) -> None:
        """Free what nobody asks for any more and nothing runs with."""
        for version in [v for v in self.resident if not v.current and not self.busy(v)]:
            self.remove(version)

    def compact(self) -> None:
        """Close the gaps between runs; nothing may be running with them."""
        at = {version.start: version for version in self.resident}
        for start, to, rows in self.runs.compact():
            version = at[start]
            self.pools.move(version.slot, start, to, rows)
            version.start = to


class Storage:
    """The shelves by kind, and a bounded host cache that takes what has to leave them.

    dropped: told of each version that the host cache had no room for either; its name is then unknown.
    """

    def __init__(self, shelves: dict[str, Shelf], host_bytes: int, dropped: Callable[[Version], None]) -> None:
        self.shelves, self.host_bytes, self._dropped = shelves, host_bytes, dropped
        self.host: dict[Version, None] = {}
        self._clock = itertools.count(1)

    def touch(self, version: Version) -> None:
        version.used = next(self._clock)

    def add(self, version: Version, adapter: Adapter, replaces: Version | None) -> None:
        """A new version: onto the device, or where that is busy (and it need not be pinned) onto the host.

        replaces: who leaves when all is well, as soon as no batch runs with it.   Whatever it raises, NoRoom or what
        the pools do, nothing has changed.
        """
        shelf = self.shelves[version.kind]
        shelf.sweep()
        if version.rows > shelf.rows:
            raise shelf.no_room(version, ())
        spare = replaces if replaces is not None and not shelf.busy(replaces) else None
        victims = shelf.victims([version.rows], (), spare)
        if victims is None and (version.pinned or version.bytes > self.host_bytes):
            raise shelf.no_room(version, ())
        left = {} if victims is None else shelf.put([(version, adapter)], victims)
        self.touch(version)
        if replaces is not None:
            self.retire(replaces)
            left.pop(replaces, None)
        if victims is None:
            left[version] = adapter
        for gone, copy in left.items():
            self._shelve(gone, copy, ())

    def bring(self, versions: Collection[Version]) -> None:
        """All of them onto the device, at once.   Raises NoRoom, and nothing changed."""
        plans = []
        for shelf in self.shelves.values():
            shelf.sweep()
            missing = [v for v in versions if not v.on_device and self.shelves[v.kind] is shelf]
            missing.sort(key=lambda v: -v.rows)
            victims = shelf.victims([v.rows for v in missing], versions)
            if victims is None:
                raise self._first_too_many(shelf, missing, versions)
            plans.append((shelf, missing, victims))
        for shelf, missing, victims in plans:
            left = shelf.put([(v, v.waiting) for v in missing if v.waiting is not None], victims)
            for version in missing:
                del self.host[version]
                version.waiting = None
            for victim, copy in left.items():
                self._shelve(victim, copy, versions)
        for version in versions:
            self.touch(version)

    def _first_too_many(self, shelf: Shelf, missing: Sequence[Version], versions: Collection[Version]) -> NoRoom:
        sizes = [v.rows for v in missing]
        first = next(i for i in range(len(missing)) if shelf.victims(sizes[: i + 1], versions) is None)
        return shelf.no_room(missing[first], versions)

    def _shelve(self, version: Version, adapter: Adapter, keep: Collection[Version]) -> None:
        """Onto the host, and from there whoever was not used for longest, until the bound is met."""
        version.waiting = adapter
        self.host[version] = None
        oldest = sorted((v for v in self.host if v not in keep), key=lambda v: v.used)
        held = sum(v.bytes for v in self.host)
        for gone in oldest:
            if held <= self.host_bytes:
                return
            held -= gone.bytes
            self.retire(gone)
            self._dropped(gone)
            log.warning(
                "adapter %r is dropped: the host cache's %d bytes are full; load it again before use",
                gone.name, self.host_bytes,
            )  # fmt: skip

    def retire(self, version: Version) -> None:
        """Nobody asks for it any more: free it, now or after its last batch."""
        version.current = False
        shelf = self.shelves[version.kind]
        if version in self.host:
            del self.host[version]
            version.waiting = None
        elif version.given:
            shelf.pools.take_back(version.slot)
        shelf.sweep()

    def release(self, version: Version) -> None:
        """One batch less runs with it."""
        version.users -= 1
        if not version.users and not version.current:
            self.shelves[version.kind].sweep()
