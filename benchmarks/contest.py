"""What every suite shares: what a run was asked for, what a case yields, and how times become records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

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
    """Of one case: its records, and what the gate refused, a line each."""

    records: list[Record] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


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


def first_line(error: Exception) -> str:
    """An error as one line: a refusal of the gate as it is, anything else with its type."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


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
