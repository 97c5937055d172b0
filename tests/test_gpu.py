"""`make gpu` on a CPU: every part at a tiny size, files as they come, and clear words where it cannot run."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora_kernels
from benchmarks import gpu, probe, tune
from benchmarks.probe import SIZES, Problem, launch, operands
from benchmarks.records import read
from fastlora_kernels.launch import Launch
from fastlora_kernels.tables import admits, table

ROOT = Path(__file__).parents[1]


def make(*words: str) -> list[str]:
    return ["make", "gpu", f"PYTHON={sys.executable}", "DEVICE=cpu", *words]


def environment(out: Path) -> dict[str, str]:
    return {**os.environ, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}


def program(path: Path, script: str) -> str:
    """A shell script to start in another's place."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def started_with(out: Path) -> list[int]:
    """The processes, of all that run, that were told to write to `out`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"OUT={out}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def left_by(out: Path) -> list[int]:
    """Those that outlive what started them by five seconds; they are ended here."""
    deadline = time.monotonic() + 5
    while (found := started_with(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(make(), cwd=ROOT, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "run.log").read_text()[-3000:]
    return folder


def test_every_part_runs_and_is_kept(out: Path) -> None:
    parts = json.loads((out / "run.json").read_text())
    assert list(parts) == list(gpu.PARTS) and {part["state"] for part in parts.values()} == {"ok"}
    assert parts["tests"]["passed"] > 3 and parts["tests"]["failed"] == 0
    assert parts["tune"]["rows"] >= 1
    assert set(parts["bench"]["files"]) >= {"linear.json", "step.json", "overhead.json"}
    assert set(parts["profile"]["ideal_bytes"]) == set(gpu.PROFILED)


def test_the_suites_are_timed_with_the_tuned_tables(out: Path) -> None:
    table = json.loads((out / "tables" / "interpreter.json").read_text())
    assert "stub clock" in {row["source"] for rows in table["tiles"].values() for row in rows}
    assert read(out / "linear.json").records


@pytest.mark.parametrize("part", ["tests", "tune", "bench", "sanitize", "profile"])
def test_what_a_part_starts_is_told_of_the_tuned_tables(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by a program in Python's place."""
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", 'echo "tables: $FASTLORA_TABLES"'))
    run, told = gpu.Run("cpu", tmp_path), f"tables: {tmp_path / 'tables'}"
    gpu.PARTS[part](run, 10)
    assert told not in (tmp_path / "run.log").read_text()
    (tmp_path / "tables").mkdir()
    gpu.PARTS[part](run, 10)
    assert told in (tmp_path / "run.log").read_text().splitlines()


def test_what_comes_back_fits_the_way_back(out: Path) -> None:
    """At most eight files, 16 MiB each, two folders down: what a lent machine's transfer takes."""
    files = [path for path in out.rglob("*") if path.is_file()]
    suites = {f"{suite}.json" for suite in gpu.SUITES}
    assert len({path.name for path in files} | suites) <= 8
    assert all(path.stat().st_size < 2**24 and len(path.relative_to(out).parts) <= 3 for path in files)


def heed() -> None:
    """Signals end a program, also where these tests were started to ignore them, as behind nohup."""
    for ends in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ends, signal.SIG_DFL)


def test_an_interrupted_run_leaves_what_it_had_and_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        make("PARTS=environment tune bench"), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=heed,
    )  # fmt: skip
    table = tmp_path / "tables" / "interpreter.json"
    deadline = time.monotonic() + 120
    while not table.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(started_with(tmp_path)) >= 3, "make, the command and the tuner"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
    assert process.wait(20) != 0 and not left_by(tmp_path)
    parts = json.loads((tmp_path / "run.json").read_text())
    assert [part["state"] for part in parts.values()] == ["ok", "interrupted"]
    assert json.loads(table.read_text())["tiles"]


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_the_command_ends_what_it_started(ends: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--parts", "tune bench", "--device", "cpu"],
        cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, preexec_fn=heed,
    )  # fmt: skip
    log, deadline = tmp_path / "run.log", time.monotonic() + 60
    while not (log.exists() and "benchmarks.tune" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(ends)
    assert process.wait(20) == 1 and not left_by(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["tune"]["state"] == "interrupted"


@pytest.mark.parametrize("words, said", [
    (["--parts", "tests dance", "--device", "cpu"], "PARTS: got dance, wanted any of environment tests"),
    (["--device", "tpu"], "DEVICE: got 'tpu', wanted cuda or cpu"),
    (["--device", "cpu", "--budget", "4m"], "BUDGET: got '4m', wanted a whole number of seconds"),
    (["--device", "cuda"], "torch sees no GPU"),
])  # fmt: skip
def test_bad_input(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([*words, "--out", str(tmp_path / "none")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert gpu.main(["--parts", "environment", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: OUT: got {tmp_path / 'file'}, wanted a folder that can be written (File exists)\n"
    assert shown.out == "" and (tmp_path / "file").read_text() == "kept"


def test_a_cpu_leaves_the_results_that_are_checked_in_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are of a tiny size, and lay over those of the machine's own folder."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PARTS", {"tests": lambda run, seconds: {"state": "ok"}})
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.main(["--device", "cpu"]) == 0
    assert (tmp_path / "out/gpu/run.json").exists() and not (tmp_path / "benchmarks").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [probe.main, tune.main])
def test_without_a_gpu_its_tools_say_so(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(["--out", str(tmp_path / "none")] if command is tune.main else [])
    assert "error: --device: got cuda, and torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_parts_share_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 520 seconds unless said otherwise, whoever is chosen."""

    def told(run: gpu.Run, seconds: float) -> dict[str, object]:
        return {"state": "ok", "given": seconds * run.scale}

    monkeypatch.setattr(gpu, "PARTS", {"tests": told, "tune": told})
    for words, whole in (([], 520), (["--budget", "57"], 57)):
        for parts in ("tests tune", "tune"):
            out = tmp_path / f"{parts} {whole}"
            assert gpu.main(["--parts", parts, "--device", "cpu", "--out", str(out), *words]) == 0
            given = [part["given"] for part in json.loads((out / "run.json").read_text()).values()]
            assert len(given) == len(parts.split()) and sum(given) == pytest.approx(whole)


def test_a_part_that_fails_or_stalls_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: gpu.Run, seconds: float) -> dict[str, object]:
        raise OSError("no such tool")

    def stalls(run: gpu.Run, seconds: float) -> dict[str, object]:
        code, _ = run.command(
            sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)", seconds=0.5
        )
        return {"state": gpu._ended(code)}

    monkeypatch.setattr(gpu, "PARTS", {"tune": fails, "bench": stalls, "sanitize": lambda *_: {"state": "ok"}})
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "run.json").read_text())
    assert [part["state"] for part in parts.values()] == ["OSError: no such tool", "out of time", "ok"]
    assert parts["bench"]["seconds"] < 10 and "here" in (tmp_path / "run.log").read_text()


def test_a_call_for_other_parts_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tests' failures no more than the log tells; and what failed before is not this call's failure."""

    def says(word: str, code: int) -> Any:
        def part(run: gpu.Run, seconds: float) -> dict[str, object]:
            return {"state": gpu._ended(run.command("sh", "-c", f"echo {word}; exit {code}", seconds=5)[0])}

        return part

    monkeypatch.setattr(gpu, "PARTS", {"tests": says("red", 1), "tune": says("fused", 0), "bench": says("slow", 0)})
    for parts, code in (("tests", 1), ("tune bench", 0)):
        assert gpu.main(["--parts", parts, "--device", "cpu", "--out", str(tmp_path)]) == code
    kept = json.loads((tmp_path / "run.json").read_text())
    assert {name: part["state"] for name, part in kept.items()} == dict(tests="exit code 1", tune="ok", bench="ok")
    assert [line for line in (tmp_path / "run.log").read_text().splitlines() if line in ("red", "fused", "slow")] == [
        "red", "fused", "slow",
    ]  # fmt: skip
    (tmp_path / "run.json").write_text("[1")
    assert gpu.main(["--parts", "tune", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "run.json").read_text())) == ["tune"]


@pytest.mark.parametrize("missing", [("pytest",), ("hypothesis",), ("pytest", "hypothesis")])
def test_without_what_the_tests_need_they_are_skipped(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_has", lambda module: module not in missing)
    assert gpu.main(["--parts", "tests", "--device", "cpu", "--out", str(tmp_path)]) == 0
    part = json.loads((tmp_path / "run.json").read_text())["tests"]
    assert part["state"] == "skipped" and part["why"] == f"{' and '.join(missing)} not installed"


BROKEN = """
import pathlib
import torch

torch.cuda.is_available = lambda: True
broken = []


def synchronize():
    if broken:
        raise torch.AcceleratorError("an illegal memory access")


torch.cuda.synchronize = synchronize


def test_first(): pass
def test_that_breaks(): broken.append(1); synchronize()
def test_after(): synchronize()
def test_last(): synchronize()
"""


def test_one_illegal_access_is_one_tests_failure(tmp_path: Path) -> None:
    """The worker that it leaves without a GPU is replaced."""
    (tmp_path / "broken.py").write_text(BROKEN)
    words = ["-p", "broken", "-p", "conftest", "-n", "1", "-v", "--tb=no", "-p", "no:cacheprovider", "-c", os.devnull]
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests", ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--rootdir", str(tmp_path), str(tmp_path / "broken.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert "replacing crashed worker" in done.stdout, done.stdout + done.stderr
    assert set(re.findall(r"PASSED .*::(\w+)", done.stdout)) == {"test_first", "test_after", "test_last"}
    assert set(re.findall(r"FAILED .*::(\w+)", done.stdout)) == {"test_that_breaks"}


def test_a_part_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that it started and left, nor those that run side by side when one is out of time."""
    monkeypatch.setenv("OUT", str(tmp_path))
    run = gpu.Run("cpu", tmp_path)
    code, text = run.command("sh", "-c", "sleep 60 & echo over", seconds=5)
    assert (code, text) == (0, "over\n")
    codes, text = run.together(["sh", "-c", "echo quick"], ["sh", "-c", "sleep 60 & sleep 60"], seconds=0.5)
    assert codes == [0, None] and "quick" in text
    assert not left_by(tmp_path)


def test_the_profiler_counts_our_launches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path / "ncu", 'for word in "$@"; do echo "word: $word"; done')
    assert gpu.profile(gpu.Run("cuda", tmp_path), 5)["state"] == "ok"
    words = re.findall("word: (.*)", (tmp_path / "run.log").read_text())
    kind, pattern = words[words.index("--kernel-name") + 1].split(":", 1)
    launched: list[str] = []
    call = Launch.__call__

    def watched(self: Launch, *given: Any) -> None:
        launched.append(self.kernel.fn.__name__)
        call(self, *given)

    monkeypatch.setattr(Launch, "__call__", watched)
    for kernel in gpu.PROFILED:
        launch(kernel, operands(Problem(kernel, *SIZES["tiny"]), "cpu"))
    torchs = [
        "vectorized_elementwise_kernel",
        "distribution_elementwise_grid_stride_kernel",
        "_reduce_kernel",
        "_x_kernel",
    ]
    counted = [name for name in [*launched, "_persistent_kernel", *torchs] if re.search(pattern, name)]
    assert kind == "regex" and counted == ["_expand_kernel", "_expand_kernel", "_dy_kernel", "_persistent_kernel"]


def test_the_sanitizer_sees_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the package compiles, and its GEMMs once at a size where tables ask for descriptors."""
    seen = set()
    call = Launch.__call__

    def watched(self: Launch, *given: Any) -> None:
        seen.add(self.kernel.fn.__name__)
        call(self, *given)

    monkeypatch.setattr(Launch, "__call__", watched)
    assert probe.main(["--device", "cpu", "--size", "tiny", "--unchecked"]) == 0
    modules = [import_module(f"fastlora_kernels.{m.name}") for m in pkgutil.iter_modules(fastlora_kernels.__path__)]
    every = {name for module in modules for name in vars(module) if re.fullmatch("_.+_kernel", name)}
    assert seen == every - {"_persistent_kernel"} and len(seen) > 10
    M, N, K, R = SIZES["described"]
    for kernel in probe.GEMMS:
        problem = Problem(kernel, M, N, K, R, p=0.1)
        row = next(row for row in table("sm_90")["tiles"][kernel] if admits(row, problem.dtype, **problem.sizes))
        assert row["tile"].get("tma") or row["source"] == "measured", "a GPU's tuner may have found loads faster"
        assert N % 16 == K % 16 == 0, "what a descriptor takes"


@pytest.mark.parametrize("memory, races, state", [
    ("0 errors", "0 hazards displayed (0 errors, 0 warnings)", "ok"),
    ("0 errors", "3 hazards displayed (3 errors, 0 warnings)", "see run.log"),
    ("2 errors", "0 hazards displayed (0 errors, 0 warnings)", "see run.log"),
    (None, "0 hazards displayed (0 errors, 0 warnings)", "see run.log"),
])  # fmt: skip
def test_both_checks_run_at_once_and_each_is_heard(
    memory: str | None, races: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tools that say what compute-sanitizer says, and wait for each other."""
    says = {"memcheck": f"ERROR SUMMARY: {memory}", "racecheck": f"RACECHECK SUMMARY: {races}"}
    other = {"memcheck": "racecheck", "racecheck": "memcheck"}
    lines = [
        f'{check}) touch {tmp_path}/{check}; until [ -e {tmp_path}/{other[check]} ]; do sleep 0.1; done; '
        f'{"exit 1" if "None" in said else f"echo ========= {said!r}"};;'
        for check, said in says.items()
    ]  # fmt: skip
    program(tmp_path / "compute-sanitizer", "\n".join(["case $2 in", *lines, "esac"]))
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", "exit 0"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.sanitize(gpu.Run("cuda", tmp_path), 5)
    wanted = f"{memory}" if memory else "no summary, exit code 1"
    assert found == {"state": state, "bare": "ok", "memcheck": wanted, "racecheck": f"{races[0]} errors"}
    words = (tmp_path / "run.log").read_text()
    assert words.count("--described") == 3 and words.count("--jobs") == 1
