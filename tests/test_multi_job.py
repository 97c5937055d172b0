"""The example of four jobs: it runs as a person runs it, at a tiny size, and what it says of itself is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import multi_job  # noqa: E402

SPANS = {"summary": range(8), "speakers": range(6), "last-line": range(2, 8), "first-fact": range(8)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jobs")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "examples" / "multi_job.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_loss_is_that_of_the_job_alone(report: dict[str, Any]) -> None:
    losses = report["losses"]
    assert set(losses) == {f"{name} {step}" for name, span in SPANS.items() for step in span}
    for found in losses.values():
        assert found["together"] == pytest.approx(found["alone"], rel=1e-5)
        assert found["together"] == pytest.approx(found["float64"], rel=1e-5)
    assert report["largest_difference"] < 1e-5 and report["error"]["together"] <= report["error"]["limit"]


def test_one_joined_late_one_finished_early_and_all_were_saved(out: Path) -> None:
    ranks = {"summary": 32, "speakers": 4, "last-line": 8, "first-fact": 16}
    for name, rank in ranks.items():
        state = load_file(out / name / "adapter_model.safetensors")
        assert {t.shape[0] for key, t in state.items() if "lora_A" in key} == {rank}
        assert any(t.abs().max() > 0 for key, t in state.items() if "lora_B" in key), "nothing was trained"


def test_three_ways_are_timed(report: dict[str, Any]) -> None:
    assert set(report["seconds"]) == {"one batch", "in turn, PEFT", "in turn, PEFT patched by fastlora"}
    assert all(seconds > 0 for seconds in report["seconds"].values())


def test_a_job_that_trains_otherwise_is_caught() -> None:
    """The comparison's own judgement: an error of one part in a thousand at one loss of many."""
    exact = {("job", step): 2.0 + step for step in range(20)}
    usual = {key: loss * (1 + 6e-8) for key, loss in exact.items()}
    wrong = {**usual, ("job", 3): exact["job", 3] * 1.001}
    limit = multi_job.CHANCE * multi_job.error(usual, exact)
    assert multi_job.error(usual, exact) <= limit < multi_job.error(wrong, exact)


def test_too_few_steps_are_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        multi_job.parse(["--steps", "3"])
    assert "--steps: got 3, wanted 4 or more" in capsys.readouterr().err.splitlines()[-1]
