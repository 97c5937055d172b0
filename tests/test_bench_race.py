"""The race and its rows: who raises is out by name, a GPU says what it ran without a graph, each figure is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import block, clock, layers, linear, records
from benchmarks.__main__ import main
from benchmarks.baselines import peft_style
from benchmarks.clock import Entry
from benchmarks.contest import Bench, Found, Subject, record, timed
from benchmarks.gate import Operands
from benchmarks.groups import Block
from benchmarks.machine import Ceilings, Machine
from fastlora_kernels.traffic import Work

CPU = torch.device("cpu")
MACHINE = Machine(
    CPU, "none", 1, Ceilings(copy_gb_s=10.0, matmul_tflop_s={"fp32": 2.0, "bf16": 1.0}), torch.ones(2**12)
)
SUBJECT = Subject("linear", "a case", 8, 4, 4, 2, "fp32", "fp32", 0.0)


def raising(after: int) -> Any:
    """A side that computes so many times and then raises."""
    left = [after]

    def run(_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("it gave up\nin two lines")

    return run


@pytest.mark.parametrize("after", [0, clock.WARM_ROUNDS, clock.WARM_ROUNDS + 1])
def test_who_raises_is_out_and_the_others_go_on(after: int) -> None:
    """In warm-up, in the first round, in the second: with every pass of its own."""
    entries = [Entry("good", "forward", run=lambda _: None), Entry("bad", "forward", run=lambda _: None)]
    entries.append(Entry("bad", "both", run=raising(after)))
    raced = clock.race(entries, rounds=3, flush=torch.ones(8))
    assert list(raced.times) == [("good", "forward")] and len(raced.times["good", "forward"]) == 30
    assert raced.failed == {"bad": "RuntimeError: it gave up"}
    assert clock.race_host(entries, 3, CPU).failed.keys() == {"bad"}


def ten_calls(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Any:
    """A plugin that passes the gate, and raises once it has been called that often."""
    call, give_up = peft_style(x, w, bias, a, b, scale, p), raising(10)

    def counted() -> Tensor:
        give_up(None)
        return call()

    return counted


def test_a_late_failure_costs_nobody_else_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SETTLED", 0.0)
    name = f"{__name__}:ten_calls"
    arguments = ["linear", "--plugin", name, "--impl", "fastlora", "--device", "cpu", "--set", "tiny", "--rounds", "20"]
    assert main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 1
    found = records.read(tmp_path / "linear.json")
    assert {r.impl for r in found.records} == {layers.FLOOR, "fastlora"}
    assert len({r.case for r in found.records}) == 3
    assert f"tiny M5 r4 fp32 p0 {name}: RuntimeError: it gave up" in found.stamp["refused"]


def test_who_cannot_be_made_or_weighed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(entry: Entry, device: torch.device) -> float:
        if entry.key == ("heavy", "both"):
            raise torch.OutOfMemoryError("out of memory")
        return 1.0

    def unmade() -> Iterator[Entry]:
        yield Entry("unmade", "forward", run=lambda _: None)
        raise MemoryError("no room for another copy")

    def made(impl: str) -> list[Entry]:
        return [Entry(impl, which, run=lambda _: None) for which in ("forward", "both")]

    monkeypatch.setattr("benchmarks.contest.peak", peak)
    sides = {"unmade": unmade, "heavy": partial(made, "heavy"), "good": partial(made, "good")}
    found, bench = Found(), Bench(MACHINE, {}, rounds=2, set_name="tiny")
    timed(SUBJECT, sides, bench, found, errors=dict.fromkeys(sides))
    assert [(r.impl, r.pass_) for r in found.records] == [("good", "forward"), ("good", "both")]
    assert found.refused == [
        "a case unmade: MemoryError: no room for another copy",
        "a case heavy: OutOfMemoryError: out of memory",
    ]


@pytest.fixture
def a_stub_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda's events, streams and graphs without a GPU.   Returns whom a graph held, in order."""
    held: list[str] = []

    def event(enable_timing: bool) -> Any:
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda stop: 2.0)

    def captured(entry: Entry, pool: Any) -> Any:
        if "uncapturable" in entry.impl:
            raise RuntimeError("operation not permitted when stream is capturing")
        held.append(entry.impl)
        return entry.prepare, entry.run

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(clock, "_after_a_broken_capture", lambda: held.append("mended"))
    monkeypatch.setattr(clock, "_warm", lambda entry: entry.run(entry.prepare()))
    monkeypatch.setattr(clock, "_captured", captured)
    return held


def test_a_gpu_times_what_no_graph_holds_as_it_runs_and_says_so(a_stub_gpu: list[str]) -> None:
    entries = [Entry(impl, "forward", run=lambda _: None) for impl in ("first", "uncapturable", "last")]
    entries.append(Entry("lists", "forward", run=lambda _: None, eager="it reads lists"))
    entries.append(Entry("broken", "forward", run=raising(0)))
    flush: Any = SimpleNamespace(is_cuda=True, sum=lambda: None)
    raced = clock.race(entries, rounds=3, flush=flush)
    assert raced.times == {(impl, "forward"): [2.0] * 3 for impl in ("first", "uncapturable", "last", "lists")}
    assert a_stub_gpu == ["first", "mended", "last"]
    assert raced.failed == {"broken": "RuntimeError: it gave up"}
    assert raced.eager == {
        ("uncapturable", "forward"): "RuntimeError: operation not permitted when stream is capturing",
        ("lists", "forward"): "it reads lists",
    }


def row(times: list[float], floor: list[float], work: Work | None = None, dtype: str = "fp32") -> records.Record:
    both = {("one", "both"): times, (layers.FLOOR, "both"): floor}
    return record(replace(SUBJECT, dtype=dtype), ("one", "both"), both, MACHINE, work=work)


def test_a_row_has_the_quantiles_that_it_names() -> None:
    found = row([float(ms) for ms in range(11)], [1.0] * 11)
    assert (found.p20_ms, found.median_ms, found.p80_ms) == pytest.approx((2.0, 5.0, 8.0))


def test_a_ratio_is_to_the_frozen_layer_in_the_same_round() -> None:
    assert row([3.0, 60.0, 2.0], [1.0, 20.0, 4.0]).ratio_to_frozen == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("work", "fraction"),
    [
        (Work(flops=4 * 10**9, bytes=1), 0.5),  # 2 ms at 2 TFLOP/s, in 4 ms
        (Work(flops=1, bytes=10**7), 0.25),  # 1 ms at 10 GB/s
        (None, None),
    ],
)
def test_the_roof_is_the_least_time_over_the_median(work: Work | None, fraction: float | None) -> None:
    for dtype in ("fp32", "bf16"):  # which may be multiplied in fp32, faster here
        assert row([4.0] * 3, [1.0] * 3, work, dtype).roof_fraction == pytest.approx(fraction)


def test_a_cpus_copies_are_more_than_its_caches_hold() -> None:
    operands = Operands.random(8, 16, 24, 4, torch.float32, torch.float32, 0.0, CPU)
    together = Block.random("qkv", 8, [(16, 24)] * 3, 4, torch.float32, torch.float32, CPU)
    of_each: list[tuple[Any, Any]] = [(linear._copies, operands), (block._copies, together)]
    for copies_of, one in of_each:
        machine = replace(MACHINE, flush=torch.ones(5 * one.nbytes // 4))
        copies = copies_of(one, machine)
        assert sum(t.nbytes for t in copies[1:]) >= machine.flush.nbytes, "between two uses of one others fill them"
        assert len({t.x.data_ptr() for t in copies}) == len(copies) == 6
        assert copies_of(one, replace(machine, device=torch.device("cuda"))) == [one]


def test_each_call_takes_the_next_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def build(x: Tensor, w: Tensor, *rest: Any) -> Any:
        def call() -> Tensor:
            seen.append(w.data_ptr())
            return peft_style(x, w, *rest)()

        return call

    operands = Operands.random(8, 16, 24, 4, torch.float32, torch.float32, 0.0, CPU)
    copies = [operands, operands.again(), operands.again()]
    entries = list(linear._entries("one", build, copies, itertools.cycle(range(3)), ("forward", "both")))
    seen.clear()
    for _ in range(2):
        for entry in entries:
            entry.run(entry.prepare())
    wanted = [t.w.data_ptr() for t in copies]
    assert seen == [*wanted, wanted[0]]
