"""The method: entries interleaved, their order drawn anew each round, one call timed at a time.

A CPU is timed by a steady clock; what must be cold there is rotated by whoever makes the entries, for reading a buffer
between calls makes Python's own code cold too (seen: twice the host time). On a GPU an entry is captured into CUDA
graphs, its untimed part into one of its own, and the replay is timed by events; what cannot be captured is timed as it
runs.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """What is timed: run(prepare()), of which only run counts.   capture: whether CUDA graphs may hold it."""

    impl: str
    pass_: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    capture: bool = True


Tick = Callable[[], float]
"""Runs an entry once and says how many seconds it took."""


def race(entries: Iterable[Entry], rounds: int, flush: torch.Tensor) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each round by (impl, pass).   flush: lies on the device; a GPU reads it before each call."""
    if not flush.is_cuda:
        return _rounds({(e.impl, e.pass_): _called(e) for e in entries}, rounds, SETTLED)
    torch.cuda.empty_cache()  # what the gate held is no use to the graphs' pool
    pool = torch.cuda.graph_pool_handle()  # one for all: nothing of an entry outlives its replay
    return _rounds({(e.impl, e.pass_): _replayed(e, flush, pool) for e in entries}, rounds)


def race_host(entries: Iterable[Entry], rounds: int, device: torch.device) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of host time per call, caches warm; a GPU is never waited for within a sample."""
    return _rounds({(e.impl, e.pass_): _enqueued(e, device) for e in entries}, rounds)


def _rounds(
    ticks: dict[tuple[str, str], Tick], rounds: int, seconds: float = 0.0
) -> dict[tuple[str, str], list[float]]:
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
                tick = ticks[key]()
                if turn >= 0:
                    found[key].append(tick * 1e3)
    return found


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


def _replayed(entry: Entry, flush: torch.Tensor, pool: Any) -> Tick:
    prepare, run = _captured(entry, pool) if entry.capture else (entry.prepare, entry.run)

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


def _captured(entry: Entry, pool: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The replays of both parts; what the first leaves in the pool is what the second reads."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_ROUNDS):  # compiles, and lets libraries allocate what no capture may
            entry.run(entry.prepare())
    torch.cuda.current_stream().wait_stream(side)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, pool=pool):
        torch.zeros(1, device="cuda")  # an empty graph cannot be replayed
        ready = entry.prepare()
    with torch.cuda.graph(second, pool=pool):
        entry.run(ready)
    return first.replay, lambda _: second.replay()


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
