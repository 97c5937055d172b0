"""Suite `linear`: one LoRA layer in training mode, forward, backward and both, beside every implementation of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.clock import Entry, peak, race
from benchmarks.contest import Bench, Found, Subject, first_line, record
from benchmarks.gate import Gate, Operands
from benchmarks.layers import FLOOR, Call
from benchmarks.shapes import DTYPES, Case
from benchmarks.shapes import cases as cases_of
from fastlora_kernels.traffic import Layer


def cases(bench: Bench) -> list[Case]:
    return cases_of(bench.set_name, bench.shapes)


def measure(case: Case, bench: Bench) -> Found:
    """Gate, then race every implementation that applies to the case."""
    main, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    operands = Operands.random(case.M, case.K, case.N, case.R, main, adapter, case.p, bench.machine.device)
    found = Found()
    calls, errors = admitted(operands, case, bench, found)
    entries = [e for impl, call in calls.items() for e in _entries(impl, call, operands, case.passes)]
    times = race(entries, bench.rounds, bench.machine.flush)
    subject = Subject("linear", case.name, case.M, case.K, case.N, case.R, case.dtype, case.adapter_dtype, case.p)
    layer = Layer(case.M, case.K, case.N, case.R, main.itemsize, adapter.itemsize)
    for entry in entries:
        impl, which = key = entry.impl, entry.pass_
        work = layer.frozen(which) if impl == FLOOR else layer.lora(which)
        most = peak(entry, bench.machine.device)
        found.records.append(record(subject, key, times, bench.machine, work=work, peak=most, error=errors[impl]))
    return found


def admitted(operands: Operands, case: Case, bench: Bench, found: Found) -> tuple[dict[str, Call], dict[str, float]]:
    """(calls, relative errors) of the implementations that apply and pass the gate; the others' refusals in found."""
    gate, calls, errors = Gate(operands), {}, {}
    for impl, build in bench.impls.items():
        if impl.endswith("-compiled") and not (case.compiled or bench.compile):
            continue  # it would spend longer compiling than all others take to run
        try:
            call = operands.built(build)
            if call is not None:
                errors[impl] = gate.error(impl, build, call)
                calls[impl] = call
        except Exception as error:  # whatever an implementation raises is the finding
            found.refused.append(f"{case.name} {impl}: {first_line(error)}")
    return calls, errors


def _entries(impl: str, call: Call, operands: Operands, passes: tuple[str, ...]) -> Iterator[Entry]:
    leaves = operands.leaves[:1] if impl == FLOOR else operands.leaves

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, operands.dy)

    runs = {
        "forward": Entry(impl, "forward", run=lambda _: call()),
        "backward": Entry(impl, "backward", run=backward, prepare=call),
        "both": Entry(impl, "both", run=lambda _: backward(call())),
    }
    yield from (runs[which] for which in passes)
