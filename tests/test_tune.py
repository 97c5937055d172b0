"""The offline tuner on a clock whose best tile is known, the tables it writes, and how they are adopted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adopt, gpu, tune
from benchmarks.adopt import checked, text_of
from benchmarks.records import BadInput
from benchmarks.strategies import on_top, strategy_rows
from benchmarks.tune import Bench, Problem, Tuner, neighbours, reaching, stub_clock
from fastlora_kernels import Tile, strategy, table, tile
from fastlora_kernels.tables import FOLDER


def measured(source: dict[str, Any]) -> dict[str, Any]:
    """A table as a GPU's run would have left it."""
    return json.loads(json.dumps(source).replace("stub clock", "measured"))


SMALL = dataclasses.replace(tune.GRIDS["cpu"], rows=(24,), layers=((40, 56),))


@pytest.fixture(scope="module")
def tuned() -> dict[str, Any]:
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=SMALL)
    gains = list(tuner.tiles())
    assert {found["kernel"] for found in gains} == set(tune.KERNELS) and all(found["gain"] > 1 for found in gains)
    return tuner.table


def test_each_kernel_reaches_the_best_tile(tuned: dict[str, Any]) -> None:
    best = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64}
    for kernel in tune.KERNELS:
        rows = tuned["tiles"][kernel]
        walked = {f"BLOCK_{axis}" for axis in tune.AXES[kernel]} & set(best)
        assert {axis: rows[0]["tile"][axis] for axis in walked} == {axis: best[axis] for axis in walked}, kernel
        assert rows[0]["source"] == "stub clock"


def test_a_tile_that_computes_wrong_or_does_not_compile_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([Problem("shrink", 24, 40, 56, 4, "fp32", "fp32")], "cpu", stub_clock)
    good, wrong, refused = Tile(32, BLOCK_K=64), Tile(16, BLOCK_K=64), Tile(64, BLOCK_K=64)
    right = tune.run

    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    def run(module: Any, kernel: str, t: Any, config: Tile | None = None) -> Any:
        if config == refused:
            raise OutOfResources
        return tuple(result * (1.01 if config == wrong else 1) for result in right(module, kernel, t, config=config))

    monkeypatch.setattr(tune, "run", run)
    assert bench.score(good) < math.inf and bench.score(wrong) == bench.score(refused) == math.inf
    assert list(bench.refusals) == [wrong, refused] and "tolerance" in bench.refusals[wrong]
    monkeypatch.setattr(tune, "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of our own is not a refusal
        bench.score(Tile(128))


def test_a_row_without_a_right_tile_is_said_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = dataclasses.replace(tune.GRIDS["cpu"], rows=(7,), layers=((16, 24),))
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=grid)
    right, before = tune.run, json.dumps(tuner.table["tiles"]["shrink"])

    def run(module: Any, kernel: str, *args: Any, **config: Any) -> Any:
        results = right(module, kernel, *args, **config)
        return tuple(2 * result for result in results) if kernel == "shrink" and config else results

    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr(tune, "KERNELS", ("shrink", "x"))
    found = {entry["kernel"]: entry for entry in tuner.tiles()}
    assert found["shrink"]["to"] is None and "tolerance" in found["shrink"]["why"] and found["x"]["to"]
    assert json.dumps(tuner.table["tiles"]["shrink"]) == before


def test_no_time_leaves_the_table_as_it_was() -> None:
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() - 1)
    assert list(tuner.tiles()) == list(tuner.strategies()) == []
    assert tuner.table["tiles"] == table("interpreter")["tiles"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_rows_are_tuned_on_problems_that_reach_them(arch: str) -> None:
    for kernel in tune.KERNELS:
        rows = table(arch)["tiles"][kernel]
        for index, row in enumerate(rows):
            for problem in reaching(rows, index, tune.GRIDS["cuda"].problems(kernel)):
                assert tile(kernel, arch, problem.dtype, problem.M, problem.width, problem.R) == Tile(**row["tile"])


def test_neighbours_are_one_step_away_and_lawful() -> None:
    start = Tile(16, 256, 64, num_warps=8, num_stages=1)
    around = neighbours("expand", start)
    assert start not in around and len(set(around)) == len(around)
    for t in around:
        changed = [name for name, value in vars(t).items() if value != getattr(start, name)]
        assert len(changed) == 1 and t.BLOCK_M >= 16 and t.BLOCK_N <= 256 and t.num_warps <= 8 and t.num_stages >= 1
    described = Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True)
    assert dataclasses.replace(described, flatten=True, num_stages=3) in neighbours("dx", described)
    assert dataclasses.replace(described, BLOCK_N=128, num_warps=4, num_stages=2, programs=2) in neighbours(
        "dx", described
    )
    assert not any(t.flatten or t.programs > 1 for t in neighbours("dx", described) if not t.tma)


def raced(kernel: str, M: int, fused: float, split: float, masks: int = 0, N: int = 64, K: int = 48) -> dict[str, Any]:
    """What the tuner says of one race."""
    return dict(kernel=kernel, dtype="bf16", N=N, K=K, M=M, masks=masks, fused=fused, split=split)


@contextlib.contextmanager
def installed(rows: list[dict[str, Any]], folder: Path) -> Iterator[None]:
    """These rows as the strategies of sm_90."""
    own = {name: value for name, value in table("sm_90").items() if name != "name"}
    adopt.write(folder / "sm_90.json", {**own, "strategy": rows})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_TABLES", str(folder))
        for cached in (table, strategy):
            cached.cache_clear()
        yield
    for cached in (table, strategy):
        cached.cache_clear()


ELSE = {"strategy": "split", "source": "predicted", "why": "else"}


def test_strategies_by_layer_and_rows(tmp_path: Path) -> None:
    """split up to 512 rows, fused from 1024 on, for one layer of expand alone; found again through the table."""
    times = [raced("expand", M, 1.0, M / 700) for M in (2048, 512, 1024, 1)]
    masked = [raced("group_dx", 9, masks, 0.5, masks) for masks in (3, 0)]
    rows = strategy_rows(times, "measured")
    assert [(row["strategy"], row["min_M"], row["max_M"]) for row in rows] == [("split", 1, 512), ("fused", 513, 2048)]
    bf16 = torch.bfloat16
    with installed([*rows, *strategy_rows(masked, "measured"), ELSE], tmp_path):
        assert [strategy("sm_90", bf16, M, 64, 48, 16)[0] for M in (512, 513, 2048)] == ["split", "fused", "fused"]
        assert strategy("sm_90", bf16, 1024, 64, 48, 16, "dx")[1].endswith("else")
        by_masks = [strategy("sm_90", bf16, 9, 64, 48, 16, "group_dx", masks)[0] for masks in (0, 1, 3)]
        assert by_masks == ["fused", "split", "split"]
        assert strategy("sm_90", bf16, 1024, 48, 64, 16)[1].endswith("else")
        assert strategy("sm_90", torch.float16, 1024, 64, 48, 16)[1].endswith("else")
        assert table("sm_80")["tiles"] == json.loads((FOLDER / "sm_80.json").read_text())["tiles"]


def test_a_race_speaks_for_the_rows_and_masks_it_was_run_with(tmp_path: Path) -> None:
    """Where nothing was timed, what was predicted goes on: few rows, more rows than raced, other masks."""
    rows = strategy_rows(
        [raced("expand", 8192, 1, 2), raced("dx", 8192, 1, 2), raced("group_dx", 64, 1, 2, 2)], "measured"
    )
    with installed([*rows, ELSE], tmp_path):

        def how(kernel: str, M: int, masks: int = 0) -> str:
            return strategy("sm_90", torch.bfloat16, M, 64, 48, 16, kernel, masks)[0]

        assert [how("expand", M) for M in (1, 8191, 8192, 8193)] == ["split", "split", "fused", "split"]
        assert [how("dx", 8192, masks) for masks in (0, 1)] == ["fused", "split"]
        assert [how("group_dx", 64, masks) for masks in (0, 1, 2, 3)] == ["split", "fused", "fused", "split"]


def test_what_was_measured_stays_until_it_is_measured_again(tmp_path: Path) -> None:
    """A second tune that is cut short: rows of layers, masks and M that it did not race are kept, below its own."""
    first = [raced("expand", M, 1, 2, N=N) for N in (64, 96) for M in (16, 8192)]
    first += [raced("group_dx", 8192, 1, 2, masks) for masks in (0, 3)]
    earlier = [*strategy_rows(first, "measured"), ELSE]
    again = [raced("expand", M, 2, 1) for M in (16, 512, 8192)] + [raced("expand", 8192, 2, 1, N=96)]
    rows = on_top(strategy_rows([*again, raced("group_dx", 8192, 2, 1, 3)], "measured"), earlier)
    with installed(rows, tmp_path):

        def how(kernel: str, M: int, N: int, masks: int = 0) -> str:
            return strategy("sm_90", torch.bfloat16, M, N, 48, 16, kernel, masks)[0]

        assert [how("expand", M, 64) for M in (16, 8192)] == ["split", "split"]
        assert [how("expand", M, 96) for M in (16, 8192)] == ["fused", "split"]
        assert [how("group_dx", 8192, 64, masks) for masks in (0, 3)] == ["fused", "split"]
    assert len(rows) == 3 + 2 + 1 and rows[-1] == ELSE, "three new, two that still hold somewhere"
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=SMALL)
    tuner.earlier = [*earlier, *tuner.table["strategy"]]
    next(tuner.strategies())
    kept = [row for row in tuner.table["strategy"] if row["source"] == "measured"]
    assert kept == earlier[:-1]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_tables_are_written_as_they_are_checked_in(path: Path) -> None:
    assert text_of(checked(path)) == path.read_text()


def test_adopting_installs_and_shows_the_diff(tuned: dict[str, Any], tmp_path: Path) -> None:
    tables, source = tmp_path / "package", tmp_path / "out"
    shutil.copytree(FOLDER, tables)
    adopt.write(source / "tables" / "interpreter.json", measured(tuned))
    said = adopt.adopt(source, tables, tmp_path / "results")
    assert said.startswith("--- a/interpreter.json") and '+      {"source": "measured"' in said
    assert checked(tables / "interpreter.json") == measured(tuned)
    assert adopt.adopt(source, tables, tmp_path / "results") == "interpreter.json: as it is"


def spoilt(change: str, held: dict[str, Any]) -> Any:
    row = held["tiles"]["expand"][-1]
    match change:
        case "clock":
            row["source"] = "stub clock"
        case "bounds":
            row["max_M"] = 64
        case "field":
            row["tile"]["BLOCK_Q"] = 64
        case "kernel":
            del held["tiles"]["dx"]
        case "way":
            held["strategy"][-1]["strategy"] = "both"
        case "shape":
            return [held]
    return held


@pytest.mark.parametrize("change, said", [
    ("clock", "source 'stub clock', wanted"),
    ("bounds", "the last row of expand has bounds"), ("shape", "got parts|not a"),
    ("field", "unknown fields"), ("kernel", "got parts"), ("way", "'both', wanted 'fused' or 'split'"),
])  # fmt: skip
def test_a_bad_table_is_refused_and_nothing_is_installed(change: str, said: str, tmp_path: Path) -> None:
    held = {name: value for name, value in table("sm_90").items() if name != "name"}
    source, tables = tmp_path / "out", tmp_path / "package"
    shutil.copytree(FOLDER, tables)
    (source / "tables").mkdir(parents=True)
    (source / "tables" / "sm_100.json").write_text((FOLDER / "sm_90.json").read_text())
    (source / "tables" / "sm_90.json").write_text(json.dumps(spoilt(change, json.loads(json.dumps(held)))))
    with pytest.raises(BadInput, match=said):
        adopt.adopt(source, tables, tmp_path / "results")
    assert all((tables / path.name).read_text() == path.read_text() for path in FOLDER.glob("*.json"))


def test_adopting_from_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        assert adopt.main([str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: FROM: ")


def test_counters_of_a_profiler() -> None:
    """ncu's CSV as it prints it, between lines of its own."""
    text = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_expand_kernel","dram__bytes_read.sum","Mbyte","100.5"
"0","7","_expand_kernel","dram__bytes_write.sum","Kbyte","1,000"
"0","7","_expand_kernel","gpu__time_duration.sum","us","250.0"
"1","7","_dy_kernel","dram__bytes_read.sum","byte","12"
==PROF== Disconnected"""
    first, second = gpu.counters(text)
    assert first["kernel"] == "_expand_kernel" and first["dram__bytes_read.sum"] == 100.5e6
    assert first["dram__bytes_write.sum"] == 1e6 and first["gpu__time_duration.sum"] == pytest.approx(250e-6)
    assert second == {"kernel": "_dy_kernel", "dram__bytes_read.sum": 12}
