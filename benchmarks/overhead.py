"""Suite `overhead`: host time per call of few rows on a layer too small to compute anything.

Evaluation is a forward under `no_grad`; training is a forward that autograd records and its backward. No fraction of
the roof is given: what is timed is Python and dispatch, which no FLOPs or bytes bound.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.clock import Entry, race_host
from benchmarks.contest import Bench, Found, Subject, record
from benchmarks.gate import Operands
from benchmarks.layers import FLOOR, Call
from benchmarks.linear import admitted
from benchmarks.shapes import DTYPES, Case, mix


def cases(bench: Bench) -> list[Case]:
    dtypes = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))[: 1 if bench.set_name == "tiny" else None]
    rows = (1, 4, 16)[: 1 if bench.set_name == "tiny" else None]
    return [Case("tiny", M, 4, *pair, p, ("call",)) for M in rows for pair in dtypes for p in (0.0, 0.1)]


def measure(case: Case, bench: Bench) -> Found:
    """Evaluation where nothing is dropped, training in every case."""
    main, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    operands = Operands.random(case.M, case.K, case.N, case.R, main, adapter, case.p, bench.machine.device)
    found = Found()
    calls, errors = admitted(operands, case, bench, found)
    for mode in ("training",) if case.p else ("eval", "training"):
        entries = [Entry(impl, "call", run=_run(impl, call, operands, mode)) for impl, call in calls.items()]
        raced = race_host(entries, bench.rounds, bench.machine.device)
        name = f"{mode} M{case.M} {mix(case.dtype, case.adapter_dtype)} p{case.p:g}"
        subject = Subject("overhead", name, case.M, case.K, case.N, case.R, case.dtype, case.adapter_dtype, case.p)
        found.take(name, raced)
        found.records += [record(subject, key, raced.times, bench.machine, error=errors[key[0]]) for key in raced.times]
    return found


def _run(impl: str, call: Call, operands: Operands, mode: str) -> Callable[[None], object]:
    leaves = operands.leaves[:1] if impl == FLOOR else operands.leaves

    def evaluate(_: None) -> Tensor:
        with torch.no_grad():
            return call()

    def train(_: None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, operands.dy)

    return evaluate if mode == "eval" else train
