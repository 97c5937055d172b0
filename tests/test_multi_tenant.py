"""The example of many tenants: it runs as a person runs it, at a tiny size, and checks its own answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import multi_tenant  # noqa: E402

QUICK = ["--quick", "--tokens", "6"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a quick run left its base, its adapters and its report."""
    out = tmp_path_factory.mktemp("tenants")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "examples" / "multi_tenant.py"), *QUICK, "--out", str(out), "--batch", "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "said").write_text(done.stdout)
    return out


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_request_is_answered_as_it_is_alone(out: Path) -> None:
    assert report(out)["same_tokens"] == {"requests": 7, "same": 7, "peft_mixed": 7}
    tenants = ["summary", "speakers", "last-line", "first-fact", "base", "summary + first-fact", "summary"]
    assert [answer["tenant"] for answer in report(out)["answers"]] == tenants
    said = (out / "said").read_text()
    assert all(f"\n   {tenant:<24}" in said for tenant in tenants)


def test_speeds_and_bytes_are_measured(out: Path) -> None:
    speeds = report(out)["tokens_per_second"]
    assert set(speeds) == {"bank", "bank with prompts", "base alone", "PEFT, mixed", "one tenant at a time"}
    assert all(speed > 0 for speed in speeds.values()) and len(set(speeds.values())) == 5
    sizes = report(out)["bytes"]
    assert sizes["summary"] == 4 * sizes["speakers"] == 2 * sizes["last-line"], "rank 16, 4 and 8"


def test_ones_own_adapters_whatever_their_folders_are_called(out: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "v1.0", tmp_path / "other" / "v1.0", tmp_path / "prompt"]
    for name, folder in zip(("speakers", "last-line", "first-fact"), folders, strict=True):
        shutil.copytree(out / name, folder)
    (tmp_path / "requests").write_text("Anna: Hello!\n\nOscar: Good to see you, Anna.\n" * 4)
    words = ("--model", out / "base", "--requests", tmp_path / "requests", "--adapters", *folders)
    multi_tenant.main([*QUICK, "--out", str(tmp_path / "own"), *map(str, words)])
    found = report(tmp_path / "own")
    assert found["same_tokens"] == {"requests": 8, "same": 8, "peft_mixed": 8}
    sizes = report(out)["bytes"]
    assert found["bytes"] == {
        "v1.0": sizes["speakers"], "v1.0-2": sizes["last-line"], "prompt": sizes["first-fact"]
    }  # fmt: skip


def test_a_broken_adapter_is_one_clear_line(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(out / "speakers", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"not this")
    with pytest.raises(SystemExit, match="2"):
        multi_tenant.main(["--quick", "--out", str(tmp_path), "--model", str(out / "base"), "--adapters", str(broken)])
    assert re.fullmatch(rf"error: --adapters: {re.escape(str(broken))}: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapters", "no/such"], "no/such holds no adapter_config.json"),
        (["--requests", "no/such"], "no/such holds no text"),
        (["--tokens", "0"], "got 0, wanted a whole number ≥ 1"),
        (["--batch", "few"], "invalid whole value: 'few'"),
    ],
)
def test_bad_input_is_one_clear_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        multi_tenant.parse(words)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_only_the_fine_tunes_own_base_is_taken(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").touch()
    assert not multi_tenant.fits(base, 0), "nothing says what it was trained on"
    made = {"model": "None", "data": "None", "quick": "False", "seed": "0"}
    for other in ({}, {"quick": "True"}, {"data": "mine.jsonl"}, {"seed": "1"}, {"model": "mine"}):
        (tmp_path / "report.json").write_text(json.dumps({"arguments": made | other}))
        assert multi_tenant.fits(base, 0) == (not other)
