"""Suite `block`: linear layers of a decoder layer that belong together, q, k, v and the gated MLP, in training mode.

The gate compares outputs and every gradient without dropout, for masks differ from side to side; dropout is `linear`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from tolerance import Results, assert_all_close, relative_error
from torch import Tensor

from benchmarks.clock import Entry
from benchmarks.contest import Bench, Found, Subject, timed
from benchmarks.groups import IMPLS, Block, Build, Call, peft_style
from benchmarks.layers import FLOOR
from benchmarks.machine import Machine
from benchmarks.shapes import DTYPES, SHAPES, mix
from fastlora_kernels.traffic import Gated, Group, Layer, Work

DRAWS = 3
PARTS = {"qkv": ("q", "k", "v"), "mlp": ("gate", "up", "down")}


@dataclass(frozen=True)
class Case:
    model: str
    kind: str
    M: int
    R: int
    dtype: str
    adapter_dtype: str
    p: float
    compiled: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(K, N) of each layer."""
        if self.model == "tiny":
            K, N = SHAPES["tiny"]
            return [(K, N), (K, N), (N, K) if self.kind == "mlp" else (K, N)]
        return [SHAPES[f"{self.model}.{part}"] for part in PARTS[self.kind]]

    @property
    def name(self) -> str:
        return f"{self.model}.{self.kind} M{self.M} r{self.R} {mix(self.dtype, self.adapter_dtype)} p{self.p:g}"


def cases(bench: Bench) -> list[Case]:
    return list({"tiny": _tiny, "cpu": _cpu, "gpu": _gpu}[bench.set_name]())


def _tiny() -> Iterator[Case]:
    yield Case("tiny", "qkv", 5, 8, "fp32", "fp32", 0.0)
    yield Case("tiny", "mlp", 5, 8, "fp32", "fp32", 0.1)


def _cpu() -> Iterator[Case]:
    for kind, M in (("qkv", 512), ("mlp", 256)):
        for dtype, adapter in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            for p in (0.0, 0.05):
                yield Case("qwen3-0.6b", kind, M, 16, dtype, adapter, p)


def _gpu() -> Iterator[Case]:
    """What the targets are about first; PEFT is compiled once for either kind, which takes longer than all else."""
    for adapter in ("bf16", "fp32"):
        for kind, p in itertools.product(PARTS, (0.0, 0.1)):
            yield Case("llama-3-8b", kind, 8192, 16, "bf16", adapter, p, compiled=adapter == "bf16" and p == 0)
    for kind, R in itertools.product(PARTS, (8, 64)):
        yield Case("llama-3-8b", kind, 8192, R, "bf16", "fp32", 0.0)
    for model, kind in itertools.product(("qwen3-8b", "llama-3-70b"), PARTS):
        yield Case(model, kind, 4096, 16, "bf16", "fp32", 0.0)


def measure(case: Case, bench: Bench) -> Found:
    """Gate, then race every implementation that applies to the case."""
    main, adapter, found = DTYPES[case.dtype], DTYPES[case.adapter_dtype], Found()
    block = Block.random(case.kind, case.M, case.sizes, case.R, main, adapter, bench.machine.device)
    builds, errors = _admitted(block, case, bench, found)
    blocks = _copies(block, bench.machine)
    turns = itertools.cycle(range(len(blocks)))
    sides = {impl: partial(_entries, impl, build, blocks, case.p, turns) for impl, build in builds.items()}
    subject = Subject("block", case.name, case.M, 0, 0, case.R, case.dtype, case.adapter_dtype, case.p)
    timed(subject, sides, bench, found, errors, partial(work, case))
    return found


def _copies(block: Block, machine: Machine) -> list[Block]:
    """Cold operands and warm code, as in `linear`."""
    spare = 0 if machine.device.type == "cuda" else -(-machine.flush.nbytes // block.nbytes)
    return [block, *(block.again() for _ in range(spare))]


def work(case: Case, impl: str, which: str) -> Work:
    """What the launches of a pass need: a group's on one input, and for the MLP what is between its layers, and down's.

    The frozen MLP's activation reads and writes what ours does, without z a second time.
    """
    main, adapter = DTYPES[case.dtype].itemsize, DTYPES[case.adapter_dtype].itemsize
    layers = [Layer(case.M, K, N, case.R, main, adapter) for K, N in case.sizes]
    if case.kind == "qkv":
        group = Group(tuple(layers))
        return group.frozen(which) if impl == FLOOR else group.lora(which)
    group, down = Group(tuple(layers[:2])), layers[2]
    between = Gated(case.M, down.K, 0 if impl == FLOOR else case.R, main, adapter)
    if impl == FLOOR:
        forward = group.frozen("forward") + between.glu() + down.frozen("forward")
        backward = down.frozen("backward") + between.backward(want_z=False) + group.frozen("backward")
    else:
        forward = group.lora("forward") + between.glu() + down.expand()
        backward = down.lora("backward") + between.backward() + group.lora("backward")
    return forward if which == "forward" else forward + backward


def _admitted(block: Block, case: Case, bench: Bench, found: Found) -> tuple[dict[str, Build], dict[str, float]]:
    draws = [block, *(block.again() for _ in range(DRAWS - 1))]
    expected = [_expected("peft", drawn) for drawn in draws]
    builds, errors = {}, {}
    for impl, build in IMPLS.items():
        if impl not in bench.impls:
            continue
        if impl.endswith("-compiled"):
            if not (case.compiled or bench.compile):
                continue
            torch._dynamo.reset()
        try:
            if build(block, case.p) is None:
                continue
            wanted = [_expected(impl, drawn) for drawn in draws] if impl == FLOOR else expected
            errors[impl] = _error(impl, build, draws, wanted)
            builds[impl] = build
        except Exception as error:
            found.refuse(case.name, impl, error)
    return builds, errors


def _results(call: Call, block: Block, leaves: tuple[Tensor, ...]) -> Results:
    ys = call()
    grads = torch.autograd.grad(ys, leaves, block.dys)
    return {f"result {i}": t.detach() for i, t in enumerate((*ys, *grads))}


def _expected(impl: str, block: Block) -> tuple[Results, Results]:
    """(plain torch's results, float64's); the floor's are those of updates that count for nothing."""
    narrow = replace(block, scale=0.0) if impl == FLOOR else block
    wide = narrow.doubled()
    plain, exact = (_results(peft_style(t, 0.0), t, _leaves(impl, t)) for t in (narrow, wide))
    return plain, exact


def _error(impl: str, build: Build, draws: list[Block], wanted: list[tuple[Results, Results]]) -> float:
    """The largest relative error among the results.   Raises AssertionError where the tolerance policy refuses them."""
    found = []
    for block, (plain, exact) in zip(draws, wanted, strict=True):
        call = build(block, 0.0)
        assert call is not None, "it applies with dropout, and not without"
        found.append((_results(call, block, _leaves(impl, block)), plain, exact))
    assert_all_close(found)
    return max(relative_error(actual[name], exact[name]) for actual, _, exact in found for name in exact)


def _leaves(impl: str, block: Block) -> tuple[Tensor, ...]:
    """What a side's backward computes gradients of."""
    return block.leaves[:1] if impl == FLOOR else block.leaves


def _entries(impl: str, build: Build, blocks: list[Block], p: float, turns: Iterator[int]) -> Iterator[Entry]:
    calls: list[tuple[Call, Block]] = []
    for block in blocks:
        call = build(block, p)
        assert call is not None, f"{impl} applied to these operands before"
        calls.append((call, block))
        _backward(impl, call(), block)  # no block's first call is timed

    def ready() -> tuple[Call, Block]:
        return calls[next(turns)]

    yield Entry(impl, "forward", run=lambda state: state[0](), prepare=ready)
    yield Entry(impl, "both", run=lambda state: _backward(impl, state[0](), state[1]), prepare=ready)


def _backward(impl: str, ys: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    return torch.autograd.grad(ys, _leaves(impl, block), block.dys)
