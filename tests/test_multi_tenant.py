"""The example of many tenants: it runs as a person runs it, at a tiny size, and checks its own answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "multi_tenant.py"


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), "--quick", "--out", str(out), "--tokens", "6", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLE.parents[1])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tenants")
    done = run(folder, "--batch", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_request_is_answered_as_it_is_alone(out: Path) -> None:
    assert report(out)["same_tokens"] == {"requests": 7, "same": 7}
    said = (out / "said").read_text()
    for tenant in ("summary", "speakers", "last-line", "first-word", "base", "summary + first-word"):
        assert f"\n   {tenant:<24}" in said


def test_speeds_and_bytes_are_measured(out: Path) -> None:
    speeds = report(out)["tokens_per_second"]
    assert set(speeds) == {"bank", "bank with prompts", "base alone", "PEFT, mixed", "one tenant at a time"}
    assert all(speed > 0 for speed in speeds.values()) and len(set(speeds.values())) == 5
    sizes = report(out)["bytes"]
    assert sizes["summary"] == 4 * sizes["speakers"] == 2 * sizes["last-line"], "rank 16, 4 and 8"


def test_ones_own_adapters(out: Path) -> None:
    done = run(out / "own", "--model", str(out / "base"), "--adapters", str(out / "speakers"), str(out / "first-word"))
    assert done.returncode == 0, done.stderr
    assert report(out / "own")["same_tokens"] == {"requests": 16, "same": 16}


def test_a_folder_without_an_adapter_is_one_clear_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--adapters", str(tmp_path))
    assert done.returncode == 2 and "holds no adapter_config.json" in done.stderr.splitlines()[-1]
