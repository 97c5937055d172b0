"""The offline tuner: measures the tiles of a table's rows, and where *fused* beats *split*; writes a table.

Each row keeps its bounds. Its tile is improved by steps to the neighbouring tiles, timed on the problems that reach the
row (all neighbours on its first, the quickest on all), until no step helps; what does not compile, does not fit or
fails the tolerance policy is no candidate. Rows come in the order in which their time matters, and those that the
budget does not reach keep their tile and source.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastlora_kernels as kernels
from benchmarks.adopt import write
from benchmarks.audit_cases import AXES
from benchmarks.probe import DTYPES, GEMMS, KERNELS, Problem, Yardstick, compiling, launch, operands, refusal
from benchmarks.strategies import Race, on_top, strategy_rows, warm_both
from fastlora_kernels import Tile, table
from fastlora_kernels.tables import admits

Timer = Callable[[Callable[[], Any], Tile | None], float]
"""Milliseconds of a launch; the tile is what a stub clock looks at."""

LIMITS = {
    **{f"BLOCK_{axis}": (16, 256) for axis in "MNK"},
    **{"BLOCK_R": (16, 64), "num_warps": (2, 8), "GROUP_M": (2, 64)},
}
ACCUMULATED = 128
"""fp32 sums of a GEMM's tile that a lane may hold. Of 256 Triton spills 2.7 KB at the least (sm_90), which the audit
refuses, and takes up to 40 s for it, while the other processes wait."""
UNBOUND = LIMITS | {"BLOCK_M": (1, 256), "BLOCK_K": (16, 1024)}
"""Those of glu_backward, which has no matmul."""
WORTH = 0.98
"""A step must save two per cent: less is noise."""
PROMISING, FEW = 1.05, 3
"""Of a tile's neighbours, how many go on to a row's further problems, and at most how much slower on its first."""


@dataclass(frozen=True)
class Grid:
    """The problems to tune on: rows, (N, K) of layers, ranks, dtypes of x and of the adapter."""

    rows: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    mixes: tuple[tuple[str, str], ...]
    source: str
    """What the rows then say of themselves; `adopt` takes no row of a stub clock."""
    groups: tuple[tuple[tuple[int, ...], int], ...]
    """(N of each member, K) of layers that share an input: q, k, v and gate, up."""

    group_mixes: tuple[tuple[str, str], ...]

    def races(self) -> Iterator[Race]:
        """Each layer's expand and dx, and each group's dx; a dx without masks and with all. What matters most first."""
        R = self.ranks[0]
        for (main, adapter), M in itertools.product(dict(self.mixes).items(), self.rows):
            for N, K in self.layers:
                yield Race(Problem("expand", M, N, K, R, main, adapter))
            for kernel, (N, *others), K in (
                *(("dx", (N,), K) for N, K in self.layers),
                *(("group_dx", Ns, K) for Ns, K in self.groups),
            ):
                for p in (0.0, 0.1):
                    yield Race(Problem(kernel, M, N, K, R, main, adapter, p, tuple(others)))

    def problems(self, kernel: str) -> Iterator[Problem]:
        if kernel.startswith("group"):
            yield from self._of_groups(kernel)
        elif kernel.startswith("glu"):
            (N, K), forms = self.layers[-1], itertools.product((0.1, 0.0), self.group_mixes)
            for p, (main, adapter) in forms if kernel == "glu" else [(0.0, self.group_mixes[0])]:
                yield Problem(kernel, self.rows[0], N, K, self.ranks[0], main, adapter, p)
        else:
            for (main, adapter), M, R, (N, K) in itertools.product(self.mixes, self.rows, self.ranks, self.layers):
                yield Problem(kernel, M, N, K, R, main, adapter, p=0.1 if self.layers[-1] == (N, K) else 0.0)

    def _of_groups(self, kernel: str) -> Iterator[Problem]:
        """At the most rows: each dropout, adapter and group, in an order whose first half has every pair of them."""
        choices = [(0.1, 0.0), self.group_mixes, self.groups]
        every = itertools.product(*map(range, map(len, choices)))
        for corner in sorted(every, key=lambda corner: sum(corner) % 2):
            p, (main, adapter), ((N, *others), K) = (of[at] for of, at in zip(choices, corner, strict=True))
            yield Problem(kernel, self.rows[0], N, K, self.ranks[0], main, adapter, p, tuple(others))


GRIDS = {
    "cuda": Grid(
        rows=(8192, 2048, 512, 64, 16, 1),
        layers=((4096, 4096), (14336, 4096), (4096, 14336)),
        ranks=(16, 64, 256),
        mixes=(("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")),
        source="measured",
        groups=(((4096, 1024, 1024), 4096), ((14336, 14336), 4096)),
        group_mixes=(("bf16", "bf16"), ("bf16", "fp32")),
    ),
    "cpu": Grid(
        (24, 7), ((40, 56), (56, 40)), (4,), (("fp32", "fp32"),), "stub clock", (((40, 24), 56),), (("fp32", "fp32"),)
    ),
}


def event_clock(launch: Callable[[], Any], _: Tile | None) -> float:
    """Median milliseconds on the GPU, each time with a cold L2."""
    from triton.testing import do_bench

    return float(do_bench(launch, warmup=5, rep=25, return_mode="median"))


def stub_clock(launch: Callable[[], Any], t: Tile | None) -> float:
    """A made-up time with one best tile, 32×32×64, for a run where there is nothing to time."""
    if t is None:
        launch()
        return 1.0
    return 1.0 + abs(math.log2(t.BLOCK_M / 32)) + abs(math.log2(t.BLOCK_N / 32)) + abs(math.log2(t.BLOCK_K / 64))


def neighbours(kernel: str, t: Tile, last: bool = False) -> list[Tile]:
    """The tiles one step away on each axis that the kernel reads.

    last: of a table's last row, which takes the operands that no descriptor can address, and so has none.
    """
    found = []
    gemm, limits = kernel in GEMMS, UNBOUND if kernel == "glu_backward" else LIMITS
    for axis in [f"BLOCK_{letter}" for letter in AXES[kernel]] + ["num_warps"] + ["GROUP_M"] * gemm:
        least, most = limits[axis]
        value = getattr(t, axis)
        found += [replace(t, **{axis: v}) for v in (value * 2, value // 2) if least <= v <= most]
    if gemm:
        if not last:
            found.append(replace(t, tma=not t.tma, specialize=False, flatten=False, programs=1))
        if t.tma:  # what a flattened prologue leaves of shared memory is three stages; two programs halve a tile
            found.append(replace(t, flatten=not t.flatten, num_stages=min(t.num_stages, 3)))
            half = replace(t, BLOCK_N=t.BLOCK_N // 2, num_warps=4, num_stages=2, programs=2)
            found += [half] * (t.programs == 1 and t.BLOCK_N >= 64)
        found = [n for n in found if 32 * n.num_warps * ACCUMULATED >= n.BLOCK_M * n.BLOCK_N]
    return found + [replace(t, num_stages=n) for n in (t.num_stages + 1, t.num_stages - 1) if 1 <= n <= 5]


def reaching(rows: Sequence[dict[str, Any]], index: int, problems: Iterable[Problem]) -> list[Problem]:
    """Up to four problems whose first admitting row is this one: as large as they come, of different layers."""
    found: dict[tuple[Any, ...], Problem] = {}
    for problem in problems:
        first = next((i for i, row in enumerate(rows) if admits(row, problem.dtype, **problem.sizes)), None)
        if first == index:
            found.setdefault((problem.Ns, problem.K, problem.adapter, problem.p), problem)
    return list(found.values())[:4]


class Bench:
    """Scores of one row's tiles: the geometric mean of their times on the row's problems."""

    def __init__(self, problems: list[Problem], device: str, timer: Timer) -> None:
        self.problems, self.timer = problems, timer
        torch.manual_seed(0)  # whatever was raced before: of a few fp32 numbers one draw in ten errs over the bound
        self.operands = [operands(problem, device) for problem in problems]
        self.yardstick = Yardstick.of(problems[0].kernel, self.operands[0])
        self.times: dict[tuple[Tile, int], float] = {}
        self.scores: dict[Tile, float] = {}
        self.refusals: dict[Tile, str] = {}

    def score(self, t: Tile) -> float:
        """Milliseconds; infinite for a tile that does not run, or runs wrong."""
        if t not in self.scores:
            logs = 0.0
            for at in range(len(self.problems)):
                logs += math.log(self.time(t, at)) if logs < math.inf else 0.0
            self.scores[t] = math.exp(logs / len(self.problems))
        return self.scores[t]

    def time(self, t: Tile, at: int) -> float:
        """Milliseconds on one of the problems, the first of which it must compute right."""
        if (t, at) not in self.times:
            try:
                self.times[t, at] = self._time(t, at)
            except Exception as error:
                why = refusal(error)
                if why is None:
                    raise
                self.times[t, at] = self.refuse(t, why)
        return self.times[t, at]

    def refuse(self, t: Tile, why: str) -> float:
        self.refusals[t] = why
        return math.inf

    def _time(self, t: Tile, at: int) -> float:
        kernel = self.problems[0].kernel
        if at == 0 and not self.yardstick.admits(launch(kernel, self.operands[0], t)):
            return self.refuse(t, "its results err more than the tolerance policy allows")
        return self.timer(lambda: launch(kernel, self.operands[at], t), t)


def warm(problem: Problem, t: Tile) -> None:
    """Compile into Triton's cache by launching once, in a process of its own."""
    with compiling():
        launch(problem.kernel, operands(problem, "cuda"), t)
        torch.cuda.synchronize()


class Tuner:
    """One run over a table.   deadline: time.monotonic() at which it stops between two tiles.   jobs: to compile in."""

    def __init__(
        self, arch: str, device: str, timer: Timer, deadline: float, jobs: int = 0, grid: Grid | None = None
    ) -> None:
        self.device, self.timer, self.deadline, self.grid = device, timer, deadline, grid or GRIDS[device]
        self.table: dict[str, Any] = {name: copy.deepcopy(v) for name, v in table(arch).items() if name != "name"}
        context = multiprocessing.get_context("spawn")
        self.raced: dict[Race, dict[str, Any]] = {}
        self.earlier = self.table["strategy"]
        self.pool = ProcessPoolExecutor(jobs, mp_context=context) if jobs else None

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def rows(self) -> list[tuple[str, int, list[Problem]]]:
        """(kernel, index of its row, problems), rows of many rows of bf16 first."""
        found = []
        for kernel in KERNELS:
            listed = self.table["tiles"][kernel]
            for index in range(len(listed)):
                if problems := reaching(listed, index, self.grid.problems(kernel)):
                    found.append((kernel, index, problems))

        def urgency(entry: tuple[str, int, list[Problem]]) -> tuple[int, int, int]:
            kernel, _, (problem, *_) = entry
            return list(DTYPES).index(problem.main), -problem.M, KERNELS.index(kernel)

        return sorted(found, key=urgency)

    def tiles(self) -> Iterator[dict[str, Any]]:
        """Tune row after row; yields {"kernel", "row", "from", "to", "gain"} for each that was measured.

        Where neither a row's tile nor a neighbour of it gives right results, "to" is None, "why" says what came, and
        the row stays as it was.
        """
        for kernel, index, problems in self.rows():
            if self.late:
                return
            row = self.table["tiles"][kernel][index]
            bench, start = Bench(problems, self.device, self.timer), Tile(**row["tile"])
            best = self.descend(bench, kernel, start, last=row is self.table["tiles"][kernel][-1])
            if bench.score(best) == math.inf:  # the rows after it still have something to gain
                yield {"kernel": kernel, "row": index, "from": asdict(start), "to": None, "why": bench.refusals[start]}
                continue
            was = asdict(start)  # of a tile a row says what it said, and what has changed
            row["tile"] = {n: value for n, value in asdict(best).items() if n in row["tile"] or value != was[n]}
            row["source"] = self.grid.source
            gain = bench.score(start) / bench.score(best)
            yield {"kernel": kernel, "row": index, "from": asdict(start), "to": asdict(best), "gain": gain}

    def descend(self, bench: Bench, kernel: str, start: Tile, last: bool = False) -> Tile:
        """Step to the best neighbour until none is better; only those that are quick on the first problem see all."""
        best = start
        while True:
            around = [t for t in neighbours(kernel, best, last) if (t, 0) not in bench.times]
            self.compile(bench.problems[:1], [best, *around])
            for t in [best, *around]:
                if self.late and t != start:
                    break
                bench.time(t, 0)
            most = PROMISING * bench.time(best, 0)
            quick = sorted((bench.times.get((t, 0), math.inf), at) for at, t in enumerate(around))
            few = [around[at] for time, at in quick[:FEW] if time < most and not self.late]
            self.compile(bench.problems[1:], [t for t in [best, *few] if t not in bench.scores])
            for t in [best, *few]:
                if self.late and t != start:
                    break
                bench.score(t)
            better = min(bench.scores, key=lambda t: bench.scores[t])
            if self.late or not bench.score(better) < WORTH * bench.score(best):
                return best if bench.score(best) < math.inf else better
            best = better

    def compile(self, problems: Sequence[Problem], tiles: Sequence[Tile]) -> None:
        """Side by side, each form of the kernel that the problems take with each of the tiles."""
        forms = {(problem.main, problem.adapter, problem.p > 0, len(problem.Ns)): problem for problem in problems}
        if self.pool is not None:
            list(self.pool.map(warm, *zip(*itertools.product(forms.values(), tiles), strict=True)))

    def strategies(self) -> Iterator[dict[str, Any]]:
        """Time *fused* beside *split* on the grid's layers, with the tiles as they now are, and put rows on top.

        What an earlier call measured stays until it is measured again.
        Yields {"kernel", "M", "N", "K", "dtype", "masks", "fused", "split"} (ms); "why" where one does not compile.
        """
        races = [self.with_tiles(race) for race in self.grid.races()]
        at_once = 8 if self.pool is not None else 1
        for start in range(0, len(races), at_once):
            few = races[start : start + at_once]
            if self.late:
                break
            if self.pool is not None:
                list(self.pool.map(warm_both, few))
            for race in few:
                try:
                    times = {way: self.timer(run_it, None) for way, run_it in race.ways(self.device).items()}
                except Exception as error:
                    why = refusal(error)
                    if why is None:
                        raise
                    yield {**race.sizes, "why": why}
                    continue
                self.raced[replace(race, tiles=None)] = found = {**race.sizes, **times}
                rows = strategy_rows(list(self.raced.values()), self.grid.source)
                self.table["strategy"] = on_top(rows, self.earlier)
                yield found

    def with_tiles(self, race: Race) -> Race:
        """The race with the tiles that its two ways take."""
        add = "group_add" if race.problem.kernel == "group_dx" else "add"
        return replace(race, tiles=(self.tile_of(race.problem), self.tile_of(replace(race.problem, kernel=add))))

    def tile_of(self, problem: Problem) -> Tile:
        rows = self.table["tiles"][problem.kernel]
        return Tile(**next(row["tile"] for row in rows if admits(row, problem.dtype, **problem.sizes)))


def race_strategies(tuner: Tuner, path: Path) -> int:
    """Say and write each race.   Returns how many did not compile."""
    broken = 0
    for way in tuner.strategies():
        sizes = f"M {way['M']:5}  N {way['N']:5}  K {way['K']:5}  {way['masks']} masks"
        if "why" in way:
            broken += 1
            print(f"{way['kernel']:9}{way['dtype']} {sizes}  left out: {way['why']}", flush=True)
            continue
        times = f"fused {way['fused']:.3f} ms  split {way['split']:.3f} ms"
        print(f"{way['kernel']:9}{way['dtype']} {sizes}  {times}", flush=True)
        write(path, tuner.table)
    return broken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(GRIDS), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for <arch>.json")
    parser.add_argument("--seconds", type=float, default=540.0, help="when to stop")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, and torch sees no GPU; cpu, with TRITON_INTERPRET=1, is interpreted")
    start = time.monotonic()
    arch = kernels.arch(torch.empty(0, device=args.device))
    on_gpu = args.device == "cuda"
    timer = event_clock if on_gpu else stub_clock
    jobs = min(12, (os.cpu_count() or 2) * 3 // 4) if on_gpu else 0
    tuner = Tuner(arch, args.device, timer, start + 0.35 * args.seconds, jobs)
    path = args.out / f"{arch}.json"
    broken = race_strategies(tuner, path)  # first, for they may gain most, and again with the tiles that were found
    tuner.deadline = start + 0.8 * args.seconds
    for found in tuner.tiles():
        if found["to"] is None:
            broken += 1
            print(f"{found['kernel']:13}row {found['row']}  no tile near {found['from']}: {found['why']}", flush=True)
            continue
        changed = {k: v for k, v in found["to"].items() if v != found["from"][k]}
        print(f"{found['kernel']:13}row {found['row']}  {found['gain']:.2f}×  {changed or 'kept'}", flush=True)
        write(path, tuner.table)
    tuner.deadline = start + args.seconds
    broken += race_strategies(tuner, path)
    write(path, tuner.table)
    sources = [row["source"] for rows in tuner.table["tiles"].values() for row in rows]
    print(f"{path}: {sources.count(tuner.grid.source)} of {len(sources)} tiles {tuner.grid.source}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
