"""What python -m benchmarks is told: options that a suite does not take, bad input, cores, the order and ceilings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import block, linear, machine, multi, records
from benchmarks.__main__ import main
from benchmarks.contest import Bench, Found
from benchmarks.layers import FLOOR

QUICK = ["--device", "cpu", "--set", "tiny", "--rounds", "2", "--threads", "1"]
PLUGIN = f"{__name__}:never"


def never(*_: Any) -> None:
    """A plugin that applies to nothing."""


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "block"):
        monkeypatch.setattr(f"benchmarks.{name}.measure", lambda case, bench: Found())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["liner"], "suite: got 'liner', wanted some of linear, block, step, multi, overhead"),
        (["linear", "--shape", "llama-9b"], "--shape: got 'llama-9b', wanted one of llama-3-8b, "),
        (["linear", "--impl", "cublas"], "--impl: got 'cublas', wanted some of frozen, "),
        (["linear", "--plugin", "nowhere:build"], "--plugin: got 'nowhere:build', wanted module:function"),
        (["linear", "--set", "huge"], "argument --set: invalid choice: 'huge' (choose from "),
        (["linear", "--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from "),
        (["linear", "--rounds", "0"], "argument --rounds: got '0', wanted a whole number ≥ 1"),
        (["linear", "--rounds", "²"], "argument --rounds: got '²', wanted a whole number ≥ 1"),
        (["linear", "--threads", "4096"], "--threads: got 4096, wanted 1 to "),
        (["linear", "--faster"], "unrecognized arguments: --faster"),
        (["step", "block", "--plugin", PLUGIN], "--plugin: got step, block, wanted with it any of linear, overhead"),
        (["block", "--shape", "llama-3-8b.q"], "--shape: got block, wanted with it any of linear"),
        (["linear", "--plugin", "that_exits:build"], "--plugin: got 'that_exits:build', wanted module:function that"),
        (["linear", "--plugin", "that_fails:build"], "--plugin: got 'that_fails:build', wanted module:function that"),
        (["linear", "--plugin", "math:pi"], "--plugin: got 'math:pi', which is of type float, wanted a function"),
        (["linear", "--budget", "nan"], "argument --budget: got 'nan', wanted a number of seconds ≥ 0"),
        (["linear", "--budget", "-1"], "argument --budget: got '-1', wanted a number of seconds ≥ 0"),
        (["linear", "--budget", "soon"], "argument --budget: got 'soon', wanted a number of seconds ≥ 0"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "that_exits.py").write_text("import sys; sys.exit('no GPU here')\n")
    (tmp_path / "that_fails.py").write_text("raise ZeroDivisionError('in two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    assert main([*QUICK, *arguments, "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1
    assert shown.out == "" and not out.exists()


@pytest.mark.usefixtures("no_measuring")
def test_suites_that_an_option_does_not_apply_to_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--plugin", PLUGIN, "--shape", "tiny"]
    assert main(["linear", "block", *options, *QUICK, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "--plugin does not apply to block\n--shape does not apply to block\n"


def test_an_implementation_that_no_case_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vllm-style is of many adapters; peft is in every case."""
    assert main(["overhead", "--impl", "peft", "vllm-style", *QUICK, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "overhead: none of its cases has vllm-style\n"


@pytest.mark.parametrize("where", ["a file", "a file/inside", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("as it was")
    out = str(tmp_path / where)
    monkeypatch.setattr(linear, "measure", lambda case, bench: pytest.fail("a case was measured"))
    assert main(["linear", *QUICK, "--out", out]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: --out: got {out!r}, wanted a folder that can be written (")
    assert shown.err.count("\n") == 1 and shown.out == ""
    assert (tmp_path / "a file").read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to be held to one of them")
def test_threads_are_held_to_as_many_cores() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with machine.pinned(1):
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
    with machine.pinned(2):
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 2
    assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == threads


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to be held to one of them")
def test_a_run_is_held_to_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def measure(case: Any, bench: Any) -> Found:
        seen.append(len(os.sched_getaffinity(0)))
        return Found()

    monkeypatch.setattr(linear, "measure", measure)
    assert main(["linear", *QUICK, "--out", str(tmp_path)]) == 0
    assert set(seen) == {1}


def test_a_run_says_what_had_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "measure", lambda case, bench: Found(eager=[f"{case.name} one forward: why"]))
    assert main(["linear", "--impl", FLOOR, *QUICK, "--out", str(tmp_path)]) == 0
    eager = records.read(tmp_path / "linear.json").stamp["eager"]
    assert eager[0] == "tiny M5 r4 fp32 p0 one forward: why" and len(eager) == 3


def test_a_gpu_meets_what_the_targets_are_about_first() -> None:
    bench = Bench(machine=None, impls={}, rounds=1, set_name="gpu")  # type: ignore[arg-type]
    linears = linear.cases(bench)
    assert [case.name.removeprefix("llama-3-8b.") for case in linears[:12]] == [
        *(f"{name} M8192 r16 bf16 p{p}" for name in ("q", "k", "gate", "down") for p in ("0", "0.1")),
        *(f"q M{M} r16 bf16 p0" for M in (1, 512, 2048)),
        "q M8192 r64 bf16 p0",
    ]
    assert [case.compiled for case in linears] == [True] * 2 + [False] * (len(linears) - 2), "it takes longest"
    blocks = [f"llama-3-8b.{kind} M8192 r16 bf16 p{p}" for kind in ("qkv", "mlp") for p in ("0", "0.1")]
    assert [case.name for case in block.cases(bench)[:4]] == blocks
    decode = [f"llama 2x4096 batch 64x1 {spread} r16 all" for spread in ("distinct 64", "identical 1")]
    assert [case.name for case in multi.cases(bench)[:2]] == decode


def test_the_ceilings_are_the_best_of_their_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a copy or of a read alone, FLOPs of either orientation."""
    seconds = iter([4.0, 1.0, 2.0, 8.0, 1.0, 1.0, 3.0, 3.0, 4.0, 2.0, 1.0, 0.5])
    monkeypatch.setattr(machine, "_best", lambda run, device, wanted: next(seconds))
    found = machine._ceilings(torch.device("cpu"), quick=True)
    assert found.copy_gb_s == pytest.approx(2 * 2**22 / 2 / 1e9)
    assert found.matmul_tflop_s == pytest.approx({"fp32": 2 * 64**3 / 2 / 1e12, "bf16": 2 * 64**3 / 0.5 / 1e12})


@pytest.mark.usefixtures("no_measuring")
def test_the_tiny_set_leaves_the_results_that_are_checked_in_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.__main__.TINY", tmp_path / "tiny", raising=False)
    assert main(["linear", *QUICK]) == 0
    assert not (tmp_path / "results").exists() and [*tmp_path.glob("tiny/*/linear.json")]
