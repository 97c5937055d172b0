"""python -m fastlora, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.__main__ import main

ROOT = Path(__file__).parents[1]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLORA_", "TRITON_"))}
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, "-m", "fastlora", *args],
        capture_output=True, text=True, env={**clean, "PYTHONPATH": path, **env},
    )  # fmt: skip


def test_info_in_json_names_versions_paths_and_a_passed_self_check() -> None:
    done = run("info", "--json", TRITON_INTERPRET="1", FASTLORA_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"] and facts["self_check"]["ok"] is True
    assert facts["environment"]["backend"] == "triton"
    paths = [path for shape in facts["paths"].values() for path in shape.values()]
    assert {"triton split", "triton fused"} == {" ".join(path.split()[:2]) for path in paths}
    assert all("(table interpreter" in path for path in paths), "each path says why"


def test_info_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "paths", "self_check", "ok", "training"):
        assert word in shown


def test_a_mistyped_backend_is_refused_at_import() -> None:
    done = run("info", FASTLORA_BACKEND="cuda")
    assert done.returncode != 0
    assert "FASTLORA_BACKEND: got 'cuda', wanted one of ('triton', 'torch')" in done.stderr


def test_the_switches_are_read_at_import() -> None:
    done = run("info", "--json", FASTLORA_DISABLE="True", FASTLORA_STRICT="off")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["environment"] == {"backend": None, "strict": False, "disable": True}
    assert all("FASTLORA_DISABLE=1" in path for shape in facts["paths"].values() for path in shape.values())
    done = run("info", FASTLORA_STRICT="maybe")
    assert done.returncode != 0
    assert "FASTLORA_STRICT: got 'maybe', wanted one of ('1', 'true', 'yes', 'on') (on) or" in done.stderr


def test_triton_demanded_where_there_is_no_driver_says_so() -> None:
    done = run("info", FASTLORA_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith("error: backend: 'triton' was asked for, and there is no Triton driver")
