"""python -m benchmarks on its tiny set: the files' contract, the gate, bad input, a suite that is not there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import run
from torch import Tensor
from torch.nn.functional import dropout, linear

from benchmarks import clock, layers, records
from benchmarks import linear as linear_suite
from benchmarks.__main__ import main
from benchmarks.baselines import peft_style
from benchmarks.clock import Entry
from benchmarks.contest import Bench
from benchmarks.gate import Gate, Operands, Refused
from benchmarks.shapes import SHAPES, cases
from fastlora import __main__ as front

torch.set_num_threads(1)  # for operands this small, threads only wait for each other

ROOT = Path(__file__).parents[1]
QUICK = ["--device", "cpu", "--set", "tiny", "--rounds", "2", "--threads", "1"]


def bench(out: Path, *arguments: str) -> int:
    return main([*arguments, *QUICK, "--out", str(out)])


def test_a_suite_that_is_not_there_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.SUITES", ("sparse",))
    assert bench(tmp_path) == 0
    assert "sparse: not there yet, skipped" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_tiny_set_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path) == 0
    shown = capsys.readouterr()
    for suite in ("linear", "block", "step", "overhead"):
        found = records.read(tmp_path / f"{suite}.json")
        assert len({r.key for r in found.records}) == len(found.records), "suite, case, pass and impl name a record"
        for r in found.records:
            assert r.suite == suite and 0 < r.p20_ms <= r.median_ms <= r.p80_ms
            assert r.case in shown.out and r.impl in shown.out
            if r.impl == layers.FLOOR:
                assert r.ratio_to_frozen == 1
        assert {layers.FLOOR, "peft", "fastlora"} <= {r.impl for r in found.records}
        assert found.stamp["refused"] == []
    blocks = records.read(tmp_path / "block.json")
    assert all(r.rel_error and r.roof_fraction and r.peak_mb is not None for r in blocks.records)
    linears = records.read(tmp_path / "linear.json")
    assert {r.pass_ for r in linears.records} == {"forward", "backward", "both"}
    assert all(r.rel_error and r.roof_fraction and r.peak_mb is not None for r in linears.records)
    assert "unsloth-style" not in {r.impl for r in linears.records if r.p > 0}, "it has no dropout"
    steps = records.read(tmp_path / "step.json")
    assert {(r.pass_, r.p, r.M) for r in steps.records} == {("step", 0.0, 16), ("step", 0.1, 16), ("decode", 0.0, 2)}


def test_the_files_are_the_contract(tmp_path: Path) -> None:
    assert bench(tmp_path, "linear", "--impl", "fastlora") == 0
    held = json.loads((tmp_path / "linear.json").read_text())
    assert set(held) == {"stamp", "records"}
    assert set(held["records"][0]) == {
        "suite", "case", "pass", "impl", "median_ms", "p20_ms", "p80_ms", "peak_mb", "ratio_to_frozen",
        "roof_fraction", "rel_error", "M", "K", "N", "R", "dtype", "adapter_dtype", "p", "G",
    }  # fmt: skip
    stamp = held["stamp"]
    assert {"device", "driver", "threads", "ceilings", "versions", "commit", "dirty", "date", "command"} <= set(stamp)
    assert stamp["versions"]["torch"] == torch.__version__
    assert stamp["command"].startswith("python -m benchmarks linear --impl fastlora")
    assert str(tmp_path) not in json.dumps(held), "a path of one machine"


def test_a_shape_by_name_and_the_front_door(tmp_path: Path) -> None:
    arguments = ["bench", "linear", "--impl", "fastlora", "--shape", "tiny", *QUICK, "--out", str(tmp_path)]
    assert front.main(arguments) == 0
    assert {r.impl for r in records.read(tmp_path / "linear.json").records} == {layers.FLOOR, "fastlora"}


def test_without_a_checkout_the_front_door_says_so(tmp_path: Path) -> None:
    paths = [p for p in sys.path if p and Path(p) != ROOT and (Path(p) / "torch").exists()]
    for package in ("fastlora", "kernels/fastlora_kernels"):
        (tmp_path / Path(package).name).symlink_to(ROOT / package)
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "bench"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": ":".join([str(tmp_path), *paths]), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: bench: it lives in the checkout")


def wrong_scale(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Any:
    """A plugin whose update is one percent too large."""
    return peft_style(x, w, bias, a, b, scale * 1.01, p)


def no_dropout(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Any:
    return peft_style(x, w, bias, a, b, scale, 0.0)


def other_mask_in_backward(x: Tensor, w: Tensor, bias: Any, a: Tensor, b: Tensor, scale: float, p: float) -> Any:
    """y and da under one mask, dx under another: what a seed drawn again gets wrong."""

    def call() -> Tensor:
        for_a = linear(dropout(x.detach().to(a.dtype), p), a)
        for_x = linear(dropout(x.to(a.dtype), p), a.detach())
        h = for_a + (for_x - for_x.detach())
        return (linear(x, w, bias) + linear(h, b) * scale).to(x.dtype)

    return call


def mask_of_its_own(x: Tensor, w: Tensor, bias: Any, a: Tensor, b: Tensor, scale: float, p: float) -> Any:
    """Dropout that manual_seed does not govern."""

    def call() -> Tensor:
        torch.seed()
        return peft_style(x, w, bias, a, b, scale, p)()

    return call


def never(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> None:
    return None


def test_the_gate_refuses_a_wrong_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = f"{__name__}:wrong_scale"
    assert bench(tmp_path, "linear", "--plugin", plugin, "--impl", "fastlora") == 1
    found = records.read(tmp_path / "linear.json")
    assert plugin not in {r.impl for r in found.records}, "what is wrong has no timing"
    assert len(found.stamp["refused"]) == 3
    assert f"FAILED, not timed: tiny M5 r4 fp32 p0 {plugin}: " in capsys.readouterr().out


def test_a_plugin_that_does_not_apply_is_left_out(tmp_path: Path) -> None:
    assert bench(tmp_path, "linear", "--plugin", f"{__name__}:never", "--impl", "fastlora") == 0
    assert {r.impl for r in records.read(tmp_path / "linear.json").records} == {layers.FLOOR, "fastlora"}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_the_gate_sees_masks_as_they_are(p: float, dtypes: tuple[str, str]) -> None:
    main_dtype, adapter = (getattr(torch, name) for name in dtypes)
    operands = Operands.random(40, 72, 56, 4, main_dtype, adapter, p, torch.device("cpu"))

    def error(build: layers.Build) -> float:
        call = operands.built(build)
        assert call is not None
        return Gate(operands).error("one", build, call)

    for name in ("peft", "fastlora", "fastlora-patched", "reference"):
        assert error(layers.IMPLS[name]) < 0.01
    with pytest.raises(Refused, match=r"dropout: 0.0000 of dx is zero"):
        error(no_dropout)
    for wrong in (other_mask_in_backward, mask_of_its_own):
        with pytest.raises(Refused, match=r": error .*, allowed"):
            error(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linear", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: --device: got 'cuda', and here there is only cpu\n"
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_a_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, done = linear_suite.measure, []

    def interrupted(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return measure(*arguments)

    monkeypatch.setattr(linear_suite, "measure", interrupted)
    assert bench(tmp_path, "linear", "--impl", "fastlora") == 130
    assert len({r.case for r in records.read(tmp_path / "linear.json").records}) == 1


def test_one_case_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = linear_suite.measure

    def fails_on_dropout(case: Any, what: Any) -> Any:
        if case.p:
            raise torch.OutOfMemoryError("out of memory")
        return measure(case, what)

    monkeypatch.setattr(linear_suite, "measure", fails_on_dropout)
    assert bench(tmp_path, "linear", "--impl", "fastlora") == 1
    found = records.read(tmp_path / "linear.json")
    assert {r.p for r in found.records} == {0} and len(found.stamp["refused"]) == 2


def test_a_budget_ends_between_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, "linear", "--impl", "fastlora", "--budget", "0") == 0
    assert "linear: out of time, 2 of 3 cases left out" in capsys.readouterr().err
    assert len({record.case for record in records.read(tmp_path / "linear.json").records}) == 1, "the first is measured"


def test_the_sets() -> None:
    assert len(SHAPES) == 5 * 7 + 1
    assert SHAPES["qwen3-0.6b.q"] == (1024, 2048) and SHAPES["llama-3-70b.down"] == (28672, 8192)
    for name in ("tiny", "cpu", "gpu"):
        found = cases(name)
        assert len({case.name for case in found}) == len(found), "a case's name is its own"
    gpu = cases("gpu")
    assert {1, 16384} <= {c.M for c in gpu} and {4, 256} <= {c.R for c in gpu} and {0, 0.1} == {c.p for c in gpu}
    assert {SHAPES[c.shape] for c in gpu} == {size for name, size in SHAPES.items() if name != "tiny"}
    assert {c.shape for c in cases("cpu", ["llama-3-8b.k"])} == {"llama-3-8b.k"}


def test_a_race_is_interleaved_and_its_order_changes() -> None:
    seen: list[str] = []
    entries = [Entry(name, "both", run=lambda _, name=name: seen.append(name)) for name in "abc"]
    times = clock.race(entries, rounds=4, flush=torch.ones(8)).times
    assert {key: len(ms) for key, ms in times.items()} == {(name, "both"): 40 for name in "abc"}, "short: ten times 4"
    turns = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 3


@pytest.mark.parametrize(
    ("seconds", "a_round", "asked", "rounds"),
    [(0.0, 0.1, 4, 4), (0.35, 0.1, 4, 4), (0.75, 0.1, 4, 6), (50.0, 0.1, 4, 40), (0.0, 7.0, 20, 7), (0.0, 90.0, 20, 5)],
)
def test_rounds_end_when_they_have_taken_long_enough(
    monkeypatch: pytest.MonkeyPatch, seconds: float, a_round: float, asked: int, rounds: int
) -> None:
    """Warm rounds, two of them, count as time; a minute is enough."""
    now = [0.0]

    def run(_: Any) -> None:
        now[0] += a_round

    clocks = SimpleNamespace(perf_counter=lambda: now[0], perf_counter_ns=lambda: int(now[0] * 1e9))
    monkeypatch.setattr(clock, "time", clocks)
    monkeypatch.setattr(clock, "SETTLED", seconds)
    (ms,) = clock.race([Entry("one", "forward", run=run)], rounds=asked, flush=torch.ones(8)).times.values()
    assert len(ms) == rounds


def test_only_run_is_timed_and_its_peak_is_its_own() -> None:
    entry = Entry("one", "forward", run=lambda x: x + 1, prepare=lambda: torch.ones(2**18))
    assert clock.peak(entry, torch.device("cpu")) == pytest.approx(1, rel=0.01)
    slow = replace(entry, run=lambda _: None, prepare=lambda: torch.randn(2**22))
    (ms,) = clock.race([slow], rounds=1, flush=torch.ones(8)).times.values()
    assert ms[0] < 1


def test_as_a_user_runs_it() -> None:
    done = run("bench", "--help")
    assert done.returncode == 0 and "--plugin" in done.stdout and "function(x, w, bias, a, b, scale, p)" in done.stdout


def test_a_machine_without_peft(tmp_path: Path) -> None:
    """Its formulation stands in for it in `linear`; the suite that needs a model says so."""
    code = (
        "import sys; sys.modules.update(peft=None, transformers=None); from benchmarks.__main__ import main;"
        f"sys.exit(main(['linear', 'step', *{QUICK}, '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step: needs peft, skipped" in done.stderr and not (tmp_path / "step.json").exists()
    assert {"peft-style", "fastlora"} <= {r.impl for r in records.read(tmp_path / "linear.json").records}


@pytest.mark.parametrize("suite", ["linear", "step", "multi", "overhead"])
def test_a_case_has_a_name_of_its_own(suite: str) -> None:
    """compare finds a record by its suite, case, pass and implementation."""
    module = importlib.import_module(f"benchmarks.{suite}")
    for name in ("tiny", "cpu", "gpu"):
        bench = Bench(machine=None, impls={}, rounds=1, set_name=name)  # type: ignore[arg-type]
        names = [(case.name, getattr(case, "passes", None)) for case in module.cases(bench)]
        assert len(set(names)) == len(names)


def test_many_adapters_pass_the_gate_and_are_timed(tmp_path: Path) -> None:
    assert bench(tmp_path, "multi") == 0
    found = records.read(tmp_path / "multi.json").records
    assert {r.impl for r in found} == {"frozen", "peft", "vllm-style", "fastlora"} and {r.G for r in found} == {3}
    assert all(r.rel_error is not None and r.rel_error < 1e-5 for r in found if r.impl != "frozen")
    assert all(r.roof_fraction for r in found)
