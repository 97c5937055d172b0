"""`make gpu` on a CPU: every part at a tiny size, files as they come, and clear words where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.records import read

ROOT = Path(__file__).parents[1]


def make(*words: str) -> list[str]:
    return ["make", "gpu", f"PYTHON={sys.executable}", "DEVICE=cpu", *words]


def environment(out: Path) -> dict[str, str]:
    return {**os.environ, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}


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
    assert gpu.Run("cpu", out).environment()["FASTLORA_TABLES"] == str(out / "tables")


def test_what_comes_back_fits_the_way_back(out: Path) -> None:
    """At most eight files, 16 MiB each, two folders down: what a lent machine's transfer takes."""
    files = [path for path in out.rglob("*") if path.is_file()]
    suites = {f"{suite}.json" for suite in gpu.SUITES}
    assert len({path.name for path in files} | suites) <= 8
    assert all(path.stat().st_size < 2**24 and len(path.relative_to(out).parts) <= 3 for path in files)


def test_an_interrupted_run_leaves_what_it_had(tmp_path: Path) -> None:
    process = subprocess.Popen(
        make("PARTS=environment tune"), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    table = tmp_path / "tables" / "interpreter.json"
    deadline = time.monotonic() + 120
    while not table.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, 9)
    process.wait()
    assert json.loads((tmp_path / "run.json").read_text())["environment"]["state"] == "ok"
    assert json.loads(table.read_text())["tiles"]


@pytest.mark.parametrize("words, said", [
    (["--parts", "tests dance", "--device", "cpu"], "PARTS: got dance, wanted any of environment tests"),
    (["--device", "tpu"], "DEVICE: got 'tpu', wanted cuda or cpu"),
    (["--device", "cuda"], "torch sees no GPU"),
])  # fmt: skip
def test_bad_input(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in words and gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([*words, "--out", str(tmp_path / "none")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


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
