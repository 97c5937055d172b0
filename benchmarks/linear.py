"""Suite `linear`: one LoRA layer in training mode, forward, backward and both, beside every implementation of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.clock import Entry
from benchmarks.contest import Bench, Found, Subject, timed
from benchmarks.gate import Gate, Operands
from benchmarks.layers import FLOOR, Build, Call
from benchmarks.machine import Machine
from benchmarks.shapes import DTYPES, Case
from benchmarks.shapes import cases as cases_of
from fastlora_kernels.traffic import Layer, Work


def cases(bench: Bench) -> list[Case]:
    return cases_of(bench.set_name, bench.shapes)


def measure(case: Case, bench: Bench) -> Found:
    """Gate, then race every implementation that applies to the case."""
    main, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    operands = Operands.random(case.M, case.K, case.N, case.R, main, adapter, case.p, bench.machine.device)
    found = Found()
    calls, errors = admitted(operands, case, bench, found)
    copies = _copies(operands, bench.machine)
    turns = itertools.cycle(range(len(copies)))
    sides = {impl: partial(_entries, impl, bench.impls[impl], copies, turns, case.passes) for impl in calls}
    subject = Subject("linear", case.name, case.M, case.K, case.N, case.R, case.dtype, case.adapter_dtype, case.p)
    layer = Layer(case.M, case.K, case.N, case.R, main.itemsize, adapter.itemsize)

    def work(impl: str, which: str) -> Work:
        return layer.frozen(which) if impl == FLOOR else layer.lora(which)

    timed(subject, sides, bench, found, errors, work)
    return found


def admitted(operands: Operands, case: Case, bench: Bench, found: Found) -> tuple[dict[str, Call], dict[str, float]]:
    """(calls, relative errors) of the implementations that apply and pass the gate; the others' refusals in found."""
    gate, calls, errors = Gate(operands), {}, {}
    for impl, build in bench.impls.items():
        if impl.endswith("-compiled"):
            if not (case.compiled or bench.compile):
                continue  # it would spend longer compiling than all others take to run
            torch._dynamo.reset()  # every case is a new shape, and recompilations are limited in number
        try:
            call = operands.built(build)
            if call is not None:
                errors[impl] = gate.error(impl, build, call)
                calls[impl] = call
        except Exception as error:
            found.refuse(case.name, impl, error)
    return calls, errors


@dataclass(frozen=True)
class _Layer:
    """One implementation over one copy of the operands."""

    forward: Call
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy)


def _copies(operands: Operands, machine: Machine) -> list[Operands]:
    """On a CPU more than its caches hold, so that a call meets cold operands and warm code, as a model's layers do.

    One on a GPU, whose graphs hold on to the operands that they were captured with.
    """
    if machine.device.type == "cuda":
        return [operands]
    return [operands, *(operands.again() for _ in range(-(-machine.flush.nbytes // operands.nbytes)))]


def _layers(build: Build, impl: str, copies: list[Operands]) -> list[_Layer]:
    layers = []
    for t in copies:
        call = t.built(build)
        assert call is not None, f"{impl} applied to these operands before"
        layer = _Layer(call, t.leaves[:1] if impl == FLOOR else t.leaves, t.dy)
        layer.backward(layer.forward())  # no layer's first call is timed
        layers.append(layer)
    return layers


def _entries(
    impl: str, build: Build, copies: list[Operands], turns: Iterator[int], passes: tuple[str, ...]
) -> Iterator[Entry]:
    """The passes of an implementation; every call, whoever's it is, takes the next copy."""
    layers = _layers(build, impl, copies)

    def ready() -> _Layer:
        return layers[next(turns)]

    def forwarded() -> tuple[_Layer, Tensor]:
        layer = ready()
        return layer, layer.forward()

    runs = {
        "forward": Entry(impl, "forward", run=lambda layer: layer.forward(), prepare=ready),
        "backward": Entry(impl, "backward", run=lambda state: state[0].backward(state[1]), prepare=forwarded),
        "both": Entry(impl, "both", run=lambda layer: layer.backward(layer.forward()), prepare=ready),
    }
    yield from (runs[which] for which in passes)
