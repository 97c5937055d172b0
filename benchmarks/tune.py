"""The offline tuner: measures the tiles of a table's rows, and where *fused* beats *split*; writes a table.

Each row keeps its bounds. Its tile is improved by steps to the neighbouring tiles, timed on the problems that reach the
row, until no step helps; what does not compile, does not fit or fails the tolerance policy is no candidate. Rows come
in the order in which their time matters, and those that the budget does not reach keep their tile and source.
"""

from __future__ import annotations

import argparse
import copy
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
from torch import Tensor

import fastlora_kernels as kernels
from benchmarks.adopt import write
from benchmarks.audit_cases import AXES
from benchmarks.probe import DTYPES, KERNELS, SCALE, Operands, Problem, Yardstick, operands, run
from fastlora_kernels import Tile, table
from fastlora_kernels.tables import admits

Timer = Callable[[Callable[[], Any], Tile | None], float]
"""Milliseconds of a launch; the tile is what a stub clock looks at."""

LIMITS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "BLOCK_K": (16, 256), "BLOCK_R": (16, 64), "num_warps": (2, 8)}
WORTH = 0.98
"""A step must save two per cent: less is noise."""


@dataclass(frozen=True)
class Grid:
    """The problems to tune on: rows, (N, K) of layers, ranks, dtypes of x and of the adapter."""

    rows: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    mixes: tuple[tuple[str, str], ...]
    source: str
    """What the rows then say of themselves; `adopt` takes no row of a stub clock."""

    def problems(self, kernel: str) -> Iterator[Problem]:
        for main, adapter in self.mixes:
            for M in self.rows:
                for R in self.ranks:
                    for N, K in self.layers:
                        yield Problem(kernel, M, N, K, R, main, adapter, p=0.1 if self.layers[-1] == (N, K) else 0.0)


GRIDS = {
    "cuda": Grid(
        rows=(8192, 2048, 512, 64, 16, 1),
        layers=((4096, 4096), (14336, 4096), (4096, 14336)),
        ranks=(16, 64, 256),
        mixes=(("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")),
        source="measured",
    ),
    "cpu": Grid((24, 7), ((40, 56), (56, 40)), (4,), (("fp32", "fp32"),), source="stub clock"),
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


def neighbours(kernel: str, t: Tile) -> list[Tile]:
    """The tiles one step away on each axis that the kernel reads."""
    found = []
    for axis in [f"BLOCK_{letter}" for letter in AXES[kernel]] + ["num_warps"]:
        least, most = LIMITS[axis]
        value = getattr(t, axis)
        found += [replace(t, **{axis: v}) for v in (value * 2, value // 2) if least <= v <= most]
    if kernel in ("expand", "dx"):
        found.append(replace(t, tma=not t.tma, specialize=False))
    return found + [replace(t, num_stages=n) for n in (t.num_stages + 1, t.num_stages - 1) if 1 <= n <= 5]


def reaching(
    rows: Sequence[dict[str, Any]], index: int, problems: Iterable[Problem], at_most: int = 3
) -> list[Problem]:
    """The problems whose first admitting row is this one: as large as they come, of different layers."""
    found: dict[tuple[int, ...], Problem] = {}
    for problem in problems:
        sizes = {"M": problem.M, "N": problem.width, "R": problem.R}
        first = next((i for i, row in enumerate(rows) if admits(row, problem.dtype, **sizes)), None)
        if first == index:
            found.setdefault((problem.N, problem.K), problem)
    return list(found.values())[:at_most]


class Bench:
    """Scores of one row's tiles: the geometric mean of their times on the row's problems."""

    def __init__(self, problems: list[Problem], device: str, timer: Timer) -> None:
        self.problems, self.timer = problems, timer
        self.operands = [operands(problem, device) for problem in problems]
        self.yardstick = Yardstick.of(problems[0].kernel, self.operands[0])
        self.scores: dict[Tile, float] = {}

    def score(self, t: Tile) -> float:
        """Milliseconds; infinite for a tile that does not run, or runs wrong."""
        if t not in self.scores:
            try:
                self.scores[t] = self._score(t)
            except Exception as error:  # the compiler's and the driver's refusals have no common type
                if not _refused(error):
                    raise
                self.scores[t] = math.inf
        return self.scores[t]

    def _score(self, t: Tile) -> float:
        kernel = self.problems[0].kernel
        if not self.yardstick.admits(run(kernels, kernel, self.operands[0], config=t)):
            return math.inf
        times = [self.timer(lambda o=o: run(kernels, kernel, o, config=t), t) for o in self.operands]  # type: ignore[misc]
        return math.exp(sum(map(math.log, times)) / len(times))


def _refused(error: Exception) -> bool:
    """Whether Triton or ptxas refused the tile: too much shared or tensor memory, a shape it cannot compile."""
    return type(error).__module__.startswith("triton") or "Triton" in str(error) or "ptxas" in str(error)


def warm(problem: Problem, t: Tile) -> None:
    """Compile into Triton's cache by launching once, in a process of its own."""
    try:
        run(kernels, problem.kernel, operands(problem, "cuda"), config=t)
        torch.cuda.synchronize()
    except Exception as error:
        if not _refused(error):
            raise


class Tuner:
    """One run over a table.   deadline: time.monotonic() at which it stops between two tiles.   jobs: to compile in."""

    def __init__(
        self, arch: str, device: str, timer: Timer, deadline: float, jobs: int = 0, grid: Grid | None = None
    ) -> None:
        self.device, self.timer, self.deadline, self.grid = device, timer, deadline, grid or GRIDS[device]
        self.table: dict[str, Any] = {name: copy.deepcopy(v) for name, v in table(arch).items() if name != "name"}
        context = multiprocessing.get_context("spawn")
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
        """Tune row after row; yields {"kernel", "row", "from", "to", "gain"} for each that was measured."""
        for kernel, index, problems in self.rows():
            if self.late:
                return
            row = self.table["tiles"][kernel][index]
            bench, start = Bench(problems, self.device, self.timer), Tile(**row["tile"])
            best = self.descend(bench, kernel, start)
            if bench.score(best) == math.inf:
                raise RuntimeError(f"table row {index} of {kernel}: its tile {start} neither runs nor has a neighbour")
            row["tile"] = {name: value for name, value in asdict(best).items() if name in row["tile"] or best != start}
            row["source"] = self.grid.source
            gain = bench.score(start) / bench.score(best)
            yield {"kernel": kernel, "row": index, "from": asdict(start), "to": asdict(best), "gain": gain}

    def descend(self, bench: Bench, kernel: str, start: Tile) -> Tile:
        best = start
        while True:
            around = [t for t in neighbours(kernel, best) if t not in bench.scores]
            if self.pool is not None:
                list(self.pool.map(warm, [bench.problems[0]] * len(around), around))
            for t in [best, *around]:
                if self.late and t != start:
                    break
                bench.score(t)
            better = min(bench.scores, key=lambda t: bench.scores[t])
            if self.late or not bench.score(better) < WORTH * bench.score(best):
                return best if bench.score(best) < math.inf else better
            best = better

    def strategies(self) -> Iterator[dict[str, Any]]:
        """Time *fused* beside *split* on the grid's layers, with the tiles as they now are, and put rows on top.

        Yields {"kernel", "M", "N", "K", "dtype", "fused", "split"} (ms).
        """
        measured: list[dict[str, Any]] = []
        for kernel in ("expand", "dx"):
            for main, adapter in self.grid.mixes:
                for N, K in self.grid.layers:
                    for M in self.grid.rows:
                        if self.late:
                            break
                        found = self.both_ways(Problem(kernel, M, N, K, self.grid.ranks[0], main, adapter))
                        measured.append(found)
                        yield found
        kept = [row for row in self.table["strategy"] if row["source"] == "predicted"]
        self.table["strategy"] = [*strategy_rows(measured, self.grid.source), *kept]

    def both_ways(self, problem: Problem) -> dict[str, Any]:
        t = operands(problem, self.device)
        tiles = {name: self.tile_of(replace(problem, kernel=name)) for name in (problem.kernel, "add")}
        ways = {
            "fused": lambda: run(kernels, problem.kernel, t, config=tiles[problem.kernel]),
            "split": lambda: split(problem.kernel, t, tiles["add"]),
        }
        times = {way: self.timer(launch, None) for way, launch in ways.items()}
        N, K = (problem.N, problem.K) if problem.kernel == "expand" else (problem.K, problem.N)
        return {"kernel": problem.kernel, "M": problem.M, "N": N, "K": K, "dtype": problem.main, **times}

    def tile_of(self, problem: Problem) -> Tile:
        sizes = {"M": problem.M, "N": problem.width, "R": problem.R}
        rows = self.table["tiles"][problem.kernel]
        return Tile(**next(row["tile"] for row in rows if admits(row, problem.dtype, **sizes)))


def split(kernel: str, t: Operands, add: Tile) -> Tensor:
    """The main GEMM by the vendor's library and the low-rank term added in place."""
    if kernel == "expand":
        y = torch.nn.functional.linear(t.x, t.w, t.bias)
        return kernels.add_expand(y, t.h, t.b, SCALE, out=y, config=add)
    return kernels.add_dx(torch.mm(t.dy, t.w), t.dh, t.a, t.dy.dtype, p=t.p, seed=t.seed, config=add)


def strategy_rows(measured: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows for each measured layer, by M: the faster way up to each M; neighbours that agree are one row."""
    rows: list[dict[str, Any]] = []
    groups = dict.fromkeys((m["kernel"], m["dtype"], m["N"], m["K"]) for m in measured)
    for kernel, dtype, N, K in groups:
        of = [m for m in measured if (m["kernel"], m["dtype"], m["N"], m["K"]) == (kernel, dtype, N, K)]
        mine: list[dict[str, Any]] = []
        for m in sorted(of, key=lambda m: m["M"]):
            best = "fused" if m["fused"] < m["split"] else "split"
            why = f"fused {m['fused']:.3f} ms, split {m['split']:.3f} ms at M = {m['M']}"
            if mine and mine[-1]["strategy"] == best:
                mine[-1] |= {"max_M": m["M"], "why": why}
            else:
                sizes = {"kernel": kernel, "dtype": [dtype], "N": N, "K": K, "max_M": m["M"]}
                mine.append({**sizes, "strategy": best, "source": source, "why": why})
        del mine[-1]["max_M"]  # beyond the largest M measured, as there
        rows += mine
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(GRIDS), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for <arch>.json")
    parser.add_argument("--seconds", type=float, default=540.0, help="when to stop")
    args = parser.parse_args(argv)
    start = time.monotonic()
    arch = kernels.arch(torch.empty(0, device=args.device))
    on_gpu = args.device == "cuda"
    timer = event_clock if on_gpu else stub_clock
    jobs = min(8, (os.cpu_count() or 2) // 2) if on_gpu else 0
    # a quarter of the time is for strategies, which need the tiles
    tuner = Tuner(arch, args.device, timer, start + 0.75 * args.seconds, jobs)
    path = args.out / f"{arch}.json"
    for found in tuner.tiles():
        changed = {k: v for k, v in found["to"].items() if v != found["from"][k]}
        print(f"{found['kernel']:8}row {found['row']}  {found['gain']:.2f}×  {changed or 'kept'}", flush=True)
        write(path, tuner.table)
    tuner.deadline = start + args.seconds
    for way in tuner.strategies():
        sizes = f"M {way['M']:5}  N {way['N']:5}  K {way['K']:5}"
        print(
            f"{way['kernel']:8}{way['dtype']} {sizes}  fused {way['fused']:.3f} ms  split {way['split']:.3f} ms",
            flush=True,
        )
        write(path, tuner.table)
    write(path, tuner.table)
    sources = [row["source"] for rows in tuner.table["tiles"].values() for row in rows]
    print(f"{path}: {sources.count(tuner.grid.source)} of {len(sources)} tiles {tuner.grid.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
