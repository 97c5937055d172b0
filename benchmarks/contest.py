"""What every suite shares: what a run was asked for, what a case yields, and how times become records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.clock import Entry, Raced, first_line, peak, race
from benchmarks.layers import FLOOR, Build
from benchmarks.machine import Machine
from benchmarks.records import Record
from fastlora_kernels.traffic import Work

Times = Mapping[tuple[str, str], Sequence[float]]
"""Milliseconds of each round by (impl, pass)."""


@dataclass(frozen=True)
class Bench:
    """What the user asked for.   shapes: names, empty for the set's own."""

    machine: Machine
    impls: dict[str, Build]
    rounds: int
    set_name: str
    shapes: tuple[str, ...] = ()
    compile: bool = False  # at every case, rather than only at those worth its time


@dataclass
class Found:
    """Of one case: its records; a line each, what was refused, and what a GPU timed without a CUDA graph."""

    records: list[Record] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    eager: list[str] = field(default_factory=list)

    def refuse(self, case: str, impl: str, error: Exception) -> None:
        """By name, whatever an implementation raised: that is the finding."""
        self.refused.append(f"{case} {impl}: {first_line(error)}")

    def take(self, case: str, raced: Raced) -> None:
        """What a race says beside its times."""
        self.refused += [f"{case} {impl}: {said}" for impl, said in raced.failed.items()]
        timed = {key: why for key, why in raced.eager.items() if key[0] not in raced.failed}
        self.eager += [f"{case} {impl} {which}: {why}" for (impl, which), why in timed.items()]


@dataclass(frozen=True)
class Subject:
    """The fields of a record that are the same for all implementations on a case."""

    suite: str
    case: str
    M: int
    K: int
    N: int
    R: int
    dtype: str
    adapter_dtype: str
    p: float
    G: int = 1


def timed(
    subject: Subject,
    sides: Mapping[str, Callable[[], Iterable[Entry]]],
    bench: Bench,
    found: Found,
    errors: Mapping[str, float | None],
    work: Callable[[str, str], Work | None] = lambda impl, which: None,
) -> None:
    """Race the entries that each implementation makes, a record each in `found`.

    Whoever raises while it makes them, in the race or when weighed is refused by name.   work: of (impl, pass).
    """
    entries: list[Entry] = []
    for impl, make in sides.items():
        try:
            entries += [*make()]
        except Exception as error:
            found.refuse(subject.case, impl, error)
    raced = race(entries, bench.rounds, bench.machine.flush)
    peaks = {}
    for entry in entries:
        if entry.impl not in raced.failed:
            try:
                peaks[entry.key] = peak(entry, bench.machine.device)
            except Exception as error:
                raced.failed[entry.impl] = first_line(error)
    found.take(subject.case, raced)
    for key, most in peaks.items():
        if (impl := key[0]) not in raced.failed:
            own = record(subject, key, raced.times, bench.machine, work=work(*key), peak=most, error=errors[impl])
            found.records.append(own)


def record(
    subject: Subject,
    key: tuple[str, str],
    times: Times,
    machine: Machine,
    *,
    work: Work | None = None,
    peak: float | None = None,
    error: float | None = None,
) -> Record:
    """The record of (impl, pass) out of a race.   work: what the roof is drawn over; peak in MiB."""
    ms = torch.tensor(times[key], dtype=torch.float64)
    floor = times.get((FLOOR, key[1]))
    p20, median, p80 = ms.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    roof = None
    rates = machine.ceilings.matmul_tflop_s
    rate = rates.get(subject.dtype)
    if rate is not None:  # 16 bits may be multiplied in fp32, where a machine is faster at it
        rate = max(rate, rates.get("fp32", 0.0))
    if work is not None and rate is not None:
        roof = work.seconds(rate * 1e12, machine.ceilings.copy_gb_s * 1e9) * 1e3 / median
    return Record(
        **{name: getattr(subject, name) for name in Subject.__dataclass_fields__},
        impl=key[0],
        pass_=key[1],
        median_ms=median,
        p20_ms=p20,
        p80_ms=p80,
        peak_mb=peak,
        ratio_to_frozen=None if floor is None else float((ms / torch.tensor(floor, dtype=torch.float64)).median()),
        roof_fraction=roof,
        rel_error=error,
    )
