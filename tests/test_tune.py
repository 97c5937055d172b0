"""The offline tuner on a clock whose best tile is known, the tables it writes, and how they are adopted."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import adopt, gpu, strategies, tune
from benchmarks.adopt import checked, text_of
from benchmarks.probe import GEMMS, Yardstick, launch, operands
from benchmarks.records import BadInput
from benchmarks.strategies import Race, on_top, strategy_rows
from benchmarks.tune import Bench, Problem, Tuner, neighbours, reaching, stub_clock
from fastlora_kernels import Tile, strategy, table, tile
from fastlora_kernels.tables import FOLDER


def measured(source: dict[str, Any]) -> dict[str, Any]:
    """A table as a GPU's run would have left it."""
    return json.loads(json.dumps(source).replace("stub clock", "measured"))


class OutOfResources(Exception):
    """As Triton raises it where a tile does not fit."""

    __module__ = "triton.runtime.errors"


SMALL = dataclasses.replace(tune.GRIDS["cpu"], rows=(24,), layers=((40, 56),))


@pytest.fixture(scope="module")
def tuned() -> dict[str, Any]:
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=SMALL)
    for kernel in GEMMS:  # nearer to the best than the table's, for each step interprets a GEMM
        tuner.table["tiles"][kernel][0]["tile"] |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}
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
        asked = {"tma", "flatten", "programs"} & set().union(*(row["tile"] for row in rows))
        assert kernel in GEMMS or not asked, "a row says what it said before, and what has changed"


def test_a_tile_that_computes_wrong_or_does_not_compile_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([Problem("shrink", 24, 40, 56, 4, "fp32", "fp32")], "cpu", stub_clock)
    good, wrong, refused = Tile(32, BLOCK_K=64), Tile(16, BLOCK_K=64), Tile(64, BLOCK_K=64)
    right = tune.launch

    def launch(kernel: str, t: Any, config: Tile | None = None) -> Any:
        if config == refused:
            raise OutOfResources
        return tuple(result * (1.01 if config == wrong else 1) for result in right(kernel, t, config))

    monkeypatch.setattr(tune, "launch", launch)
    assert bench.score(good) < math.inf and bench.score(wrong) == bench.score(refused) == math.inf
    assert list(bench.refusals) == [wrong, refused] and "tolerance" in bench.refusals[wrong]
    monkeypatch.setattr(tune, "launch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of our own is not a refusal
        bench.score(Tile(128))


def test_a_row_without_a_right_tile_is_said_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = dataclasses.replace(tune.GRIDS["cpu"], rows=(7,), layers=((16, 24),))
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=grid)
    right, before = tune.launch, json.dumps(tuner.table["tiles"]["shrink"])

    def launch(kernel: str, t: Any, config: Tile | None = None) -> Any:
        results = right(kernel, t, config)
        return tuple(2 * result for result in results) if kernel == "shrink" and config else results

    monkeypatch.setattr(tune, "launch", launch)
    monkeypatch.setattr(tune, "KERNELS", ("shrink", "x"))
    found = {entry["kernel"]: entry for entry in tuner.tiles()}
    assert found["shrink"]["to"] is None and "tolerance" in found["shrink"]["why"] and found["x"]["to"]
    assert json.dumps(tuner.table["tiles"]["shrink"]) == before


def test_a_race_that_does_not_compile_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = Tuner("interpreter", "cpu", stub_clock, time.monotonic() + 300, grid=SMALL)
    right = strategies.launch

    def launch(kernel: str, t: Any, config: Tile | None = None) -> Any:
        if kernel == "dx" and t.bits is not None:
            raise OutOfResources("Required: 300000, Hardware limit: 232448")
        return right(kernel, t, config)

    monkeypatch.setattr(strategies, "launch", launch)
    assert tune.race_strategies(tuner, tmp_path / "interpreter.json") == 1
    said = capsys.readouterr().out
    assert "1 masks  left out: OutOfResources: Required: 300000" in said and said.count("fused ") == 4
    found = [
        (row["kernel"], row["max_masks"]) for row in tuner.table["strategy"] if row.get("kernel") in ("dx", "group_dx")
    ]
    assert found[:3] == [("dx", 0), ("group_dx", 0), ("group_dx", 2)]
    monkeypatch.setattr(strategies, "launch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error of our own is no refusal
        next(tuner.strategies())


@pytest.mark.parametrize("error", [OutOfResources, torch.OutOfMemoryError])
@pytest.mark.parametrize("warmed, given", [
    (strategies.warm_both, (Race(Problem("expand", 24, 40, 56, 4)),)),
    (tune.warm, (Problem("x", 24, 40, 56, 4), Tile(32))),
])  # fmt: skip
def test_what_is_compiled_ahead_may_be_refused_and_keeps_no_memory(
    warmed: Any, given: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise error

    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for module in (strategies, tune):
        monkeypatch.setattr(module, "operands", refuses)
    warmed(*given)
    assert emptied == [1]


def test_groups_are_tuned_with_and_without_dropout_and_with_either_adapter() -> None:
    """At Llama-3-8B's q, k, v and gate, up: a row's four problems hold every pair of group, adapter and dropout."""
    qkv, gate_up = ((4096, 1024, 1024), 4096), ((14336, 14336), 4096)
    for kernel in ("group_shrink", "group_x", "group_dy", "group_dx", "group_add"):
        problems = list(tune.GRIDS["cuda"].problems(kernel))
        forms = [((problem.Ns, problem.K), problem.adapter, problem.p) for problem in problems]
        assert set(forms) == set(itertools.product((qkv, gate_up), ("bf16", "fp32"), (0.1, 0.0))) and len(forms) == 8
        assert {(problem.M, problem.R, problem.main) for problem in problems} == {(8192, 16, "bf16")}
        assert forms[0] == (qkv, "bf16", 0.1)
        for i, j in itertools.combinations(range(3), 2):
            assert len({(form[i], form[j]) for form in forms[:4]}) == 4
    found = Tuner("sm_100", "cuda", stub_clock, time.monotonic()).rows()  # a table that no GPU has changed
    assert {kernel for kernel, _, _ in found} == set(tune.KERNELS)
    assert [kernel for kernel, _, _ in found[:5]] == ["group_shrink", "group_x", "group_dy", "expand", "dx"]
    for kernel, index, problems in found[:7]:
        assert len(problems) == 4 and table("sm_100")["tiles"][kernel][index]["tile"].get("tma", kernel not in GEMMS)
    masked = [{problem.masks for problem in problems} for kernel, _, problems in found if kernel == "group_dx"]
    assert masked == [{0}, {2, 3}]


@pytest.mark.parametrize("kernel", ["x", "group_x", "dx", "add", "group_dx", "group_add"])
def test_masks_are_timed_as_they_run(kernel: str) -> None:
    """The x pass leaves them; dx reads them, whatever its seeds are."""
    t = operands(Problem(kernel, 24, 40, 56, 4, "fp32", p=0.5, others=(16,) if "group" in kernel else ()), "cpu")
    assert t.bits is not None
    if kernel.endswith("x") and "d" not in kernel:
        t.bits.fill_(255)
        launch(kernel, t)
        assert (t.bits[..., :7] != 255).any()
    else:
        assert all(map(torch.equal, launch(kernel, t), launch(kernel, replace(t, seeds=t.seeds + 9))))
        assert Yardstick.of(kernel, t).admits(launch(kernel, t))


def test_only_what_is_quick_on_the_first_problem_sees_them_all() -> None:
    """And a tile that is quick there and slow elsewhere is not taken."""
    problems = [Problem("shrink", 24, 40, 56, 4, "fp32", p=p) for p in (0.1, 0.0)]
    asked: list[Tile] = []

    def clock(_: Any, t: Tile) -> float:
        asked.append(t)
        seen = asked.count(t)
        return {16: 5.0, 32: 3.0 if seen == 1 else 9.0, 64: 4.0, 128: 8.0}[t.BLOCK_M] + (t.BLOCK_K != 64) + t.num_warps

    bench, start = Bench(problems, "cpu", clock), Tile(64, BLOCK_K=64, num_warps=2, num_stages=1)
    tuner = Tuner("interpreter", "cpu", clock, time.monotonic() + 300, grid=SMALL)
    assert tuner.descend(bench, "shrink", start) == start
    counts = [asked.count(t) for t in (start, replace(start, BLOCK_M=32), replace(start, BLOCK_K=128))]
    assert counts == [2, 2, 1]


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
                assert tile(kernel, arch, problem.dtype, **problem.sizes) == Tile(**row["tile"])


def test_only_the_last_row_is_tuned_as_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, asked = Tuner("sm_90", "cpu", stub_clock, time.monotonic() + 300, grid=SMALL), []
    monkeypatch.setattr(tune, "KERNELS", ("expand", "x"))
    monkeypatch.setattr(tune, "neighbours", lambda kernel, t, last: asked.append((kernel, last)) or [])
    assert [found["row"] for found in tuner.tiles()] == [5, 3] and asked == [("expand", True), ("x", False)]


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
    assert not any(4096 * t.num_warps < t.BLOCK_M * t.BLOCK_N for t in neighbours("dx", described))
    assert any(t.tma for t in around) and not any(t.tma for t in neighbours("expand", start, last=True))


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


def test_what_a_gpu_raced_is_adopted(tmp_path: Path) -> None:
    """With every bound that the tuner gives a row: up to which M from which, of how many masks at the least."""
    tables, source = tmp_path / "package", tmp_path / "out"
    shutil.copytree(FOLDER, tables)
    held = {name: value for name, value in table("sm_90").items() if name != "name"}
    races = [{**race.sizes, "fused": 1.0 + at % 2, "split": 1.5} for at, race in enumerate(tune.GRIDS["cuda"].races())]
    held["strategy"] = on_top(strategy_rows(races, "measured"), held["strategy"])
    adopt.write(source / "tables" / "sm_90.json", held)
    adopt.adopt(source, tables, tmp_path / "results")
    assert checked(tables / "sm_90.json") == held
    assert {"min_M", "min_masks"} <= set().union(*held["strategy"])


def spoilt(change: str, held: dict[str, Any]) -> Any:
    row = held["tiles"]["expand"][-1]
    match change:
        case "clock":
            row["source"] = "stub clock"
        case "bounds":
            row["max_M"] = 64
        case "descriptors":
            row["tile"]["tma"] = True
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
    ("bounds", "the last row of expand has bounds"), ("descriptors", "the last row of expand has tma"),
    ("shape", "got parts|not a"), ("field", "unknown fields"), ("kernel", "got parts"),
    ("way", "'both', wanted 'fused' or 'split'"),
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
