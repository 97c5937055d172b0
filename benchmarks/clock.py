"""The method: entries interleaved, their order drawn anew each round, one call timed at a time.

A CPU is timed by a steady clock; what must be cold there is rotated by whoever makes the entries, for reading a buffer
between calls makes Python's own code cold too (seen: twice the host time). On a GPU an entry is captured into CUDA
graphs, its untimed part into one of its own, and the replay is timed by events; what cannot be captured is timed as it
runs, and said to be. An implementation that raises is out of the race with all of its entries; the others go on.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_ROUNDS = 2
SETTLED = 3.0
"""Seconds for which short rounds go on on a CPU, where calls below 1 ms scatter by a third; to ten times as many."""

PATIENCE = 60.0
"""Seconds after which a race is over, with at least `LEAST` rounds: of calls that take seconds each."""

LEAST = 5

HOST_CALLS = 20
"""Calls to a sample of host time: microseconds each, and on a GPU fewer launches than its queue holds."""


@dataclass(frozen=True)
class Entry:
    """What is timed: run(prepare()), of which only run counts.   eager: why no CUDA graph can hold it, if none can."""

    impl: str
    pass_: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    eager: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.impl, self.pass_


Tick = Callable[[], float]
"""Runs an entry once and says how many seconds it took."""


@dataclass
class Raced:
    """What a race came to.

    times: milliseconds of each round by (impl, pass).   failed: what an implementation raised, in one line, by impl.
    eager: why a GPU timed an entry without a CUDA graph, by (impl, pass).
    """

    times: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    eager: dict[tuple[str, str], str] = field(default_factory=dict)


def race(entries: Iterable[Entry], rounds: int, flush: torch.Tensor) -> Raced:
    """flush: lies on the device; a GPU reads it before each call."""
    raced = Raced()
    if not flush.is_cuda:
        return _rounds({e.key: _called(e) for e in entries}, rounds, raced, SETTLED)
    return _rounds(_replays(entries, flush, raced), rounds, raced)


def race_host(entries: Iterable[Entry], rounds: int, device: torch.device) -> Raced:
    """Milliseconds of host time per call, caches warm; a GPU is never waited for within a sample."""
    return _rounds({e.key: _enqueued(e, device) for e in entries}, rounds, Raced())


def first_line(error: BaseException) -> str:
    """An error as one line: a refusal of the gate as it is, anything else with its type."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def _rounds(ticks: dict[tuple[str, str], Tick], rounds: int, raced: Raced, seconds: float = 0.0) -> Raced:
    """`rounds` of them, or up to ten times as many while they have not taken `seconds`; fewer where patience ends."""
    found: dict[tuple[str, str], list[float]] = {key: [] for key in ticks}
    order, chance = list(ticks), random.Random(0)
    with _no_collection():
        start = time.perf_counter()
        for turn in range(-WARM_ROUNDS, 10 * rounds):
            taken = time.perf_counter() - start
            if (turn >= rounds and taken > seconds) or (turn >= LEAST and taken > PATIENCE):
                break
            # nobody often follows the same neighbour: behind one that frees 12 MiB a call took a quarter longer
            chance.shuffle(order)
            for key in order:
                if key[0] in raced.failed:
                    continue
                try:
                    tick = ticks[key]()
                except Exception as error:  # whatever an implementation raises is the finding
                    raced.failed[key[0]] = first_line(error)
                    continue
                if turn >= 0:
                    found[key].append(tick * 1e3)
    raced.times = {key: ms for key, ms in found.items() if key[0] not in raced.failed}
    return raced


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _called(entry: Entry) -> Tick:
    def tick() -> float:
        ready = entry.prepare()
        start = time.perf_counter_ns()
        kept = entry.run(ready)
        stop = time.perf_counter_ns()
        del kept  # what it returned is freed off the clock
        return (stop - start) * 1e-9

    return tick


def _enqueued(entry: Entry, device: torch.device) -> Tick:
    def tick() -> float:
        ready = [entry.prepare() for _ in range(HOST_CALLS)]
        synchronize(device)
        start = time.perf_counter_ns()
        for one in ready:
            entry.run(one)
        stop = time.perf_counter_ns()
        synchronize(device)
        return (stop - start) * 1e-9 / HOST_CALLS

    return tick


def _replays(entries: Iterable[Entry], flush: torch.Tensor, raced: Raced) -> dict[tuple[str, str], Tick]:
    """Each entry as CUDA graphs where it can be captured, as it runs where not; whoever fails even so is out."""
    torch.cuda.empty_cache()  # what the gate held is no use to the graphs' pool
    pool = torch.cuda.graph_pool_handle()  # one for all: nothing of an entry outlives its replay
    ticks = {}
    for entry in entries:
        if entry.impl in raced.failed:
            continue
        prepare, run = entry.prepare, entry.run
        if entry.eager:
            raced.eager[entry.key] = entry.eager
        else:
            try:
                _warm(entry)
            except Exception as error:  # whatever an implementation raises is the finding
                raced.failed[entry.impl] = first_line(error)
                continue
            try:
                prepare, run = _captured(entry, pool)
            except Exception as error:
                raced.eager[entry.key] = first_line(error)
                pool = _after_a_broken_capture()
        ticks[entry.key] = _evented(prepare, run, flush)
    return ticks


def _evented(prepare: Callable[[], Any], run: Callable[[Any], Any], flush: torch.Tensor) -> Tick:
    def tick() -> float:
        ready = prepare()
        flush.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = run(ready)
        stop.record()
        stop.synchronize()
        del kept
        return float(start.elapsed_time(stop)) * 1e-3

    return tick


def _warm(entry: Entry) -> None:
    """Compiles, and lets libraries allocate what no capture may."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_ROUNDS):
            entry.run(entry.prepare())
    torch.cuda.current_stream().wait_stream(side)


def _captured(entry: Entry, pool: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The replays of both parts; what the first leaves in the pool is what the second reads."""
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # a broken capture would leave its own stream the current one
        with torch.cuda.graph(first, pool=pool):
            torch.zeros(1, device="cuda")  # an empty graph cannot be replayed
            ready = entry.prepare()
        with torch.cuda.graph(second, pool=pool):
            entry.run(ready)
    return first.replay, lambda _: second.replay()


def _after_a_broken_capture() -> Any:
    """A pool for the next captures: a broken one keeps its own, and torch's generator until a whole one follows."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    return torch.cuda.graph_pool_handle()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(entry: Entry, device: torch.device) -> float:
    """The most that run holds at once above what lay there before it, in MiB: as the device's allocator saw it."""
    ready = entry.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        entry.run(ready)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        entry.run(ready)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most / 2**20


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing on the process's stderr: the profiler's own library announces itself there."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
