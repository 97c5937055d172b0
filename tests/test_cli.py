"""python -m fastlora, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import plan_by
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastlora import dispatch, functional, ops
from fastlora.__main__ import _ops, _paths, main, self_check
from fastlora.reference import dropout_threshold
from fastlora_kernels import linear, strategy, tile

ROOT = Path(__file__).parents[1]
PATHS = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


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
    assert all("(" in path for path in paths), "each path says why"
    assert {case for case in facts["self_check"] if case != "ok"} == {
        "bf16 adapters", "fp32 adapters", "fp32 adapters, dropout 0.25",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "FASTLORA_TABLES: got '{folder}', wanted a folder of tables (<arch>.json)"),
        ("{", "{folder}/interpreter.json: not JSON (Expecting property name"),
        ("[]", "{folder}/interpreter.json: not a table, wanted its tiles and its strategy"),
    ],
)
def test_tables_that_cannot_be_used_are_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    """A folder that is not there was passed over, as if the package's own tables had been asked for."""
    folder = tmp_path / "tables"
    if text is not None:
        folder.mkdir()
        (folder / "interpreter.json").write_text(text)
    done = run("info", TRITON_INTERPRET="1", FASTLORA_TABLES=str(folder))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {said.format(folder=folder)}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["info"], ["bench", "linear", "--set", "tiny", "--impl", "frozen", "--rounds", "1", "--out"]]
)
def test_a_reader_that_leaves_gets_no_traceback(words: list[str], tmp_path: Path) -> None:
    out = [str(tmp_path)] * ("bench" in words)
    command = [sys.executable, "-W", "ignore", "-m", "fastlora", *words, *out]
    child = subprocess.Popen(command, cwd=ROOT, env=PATHS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout and child.stderr
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait() == 141 and "Traceback" not in said and "BrokenPipe" not in said


def wrong(name: str) -> dict[str, Any]:
    """The kernels' `name`, whose first result is 5 % off."""
    own = getattr(ops.kernels, name)
    return {name: lambda *inputs: (own(*inputs)[0] * 1.05, *own(*inputs)[1:])}


def of_seed(name: str, change: Any) -> dict[str, Any]:
    """The kernels' `name`, whose seed is another."""
    own = getattr(ops.kernels, name)
    return {name: lambda *inputs: own(*inputs[:6], None if inputs[6] is None else change(inputs[6]), *inputs[7:])}


def none(seed: Tensor) -> None:
    """Nothing drops."""


@pytest.mark.parametrize(
    ("broken", "cases"),
    [
        (wrong("lora_linear"), 3),
        (wrong("lora_backward"), 3),
        (of_seed("lora_backward", lambda seed: seed + 1), 1),
        (of_seed("lora_linear", none) | of_seed("lora_backward", none), 1),
    ],
    ids=["y", "dx", "another mask in backward", "no dropout"],
)
def test_the_self_check_sees_broken_kernels(
    broken: dict[str, Any], cases: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    for name, kernel in broken.items():
        monkeypatch.setattr(ops.kernels, name, kernel)
    assert main(["info", "--json"]) == 1
    check = json.loads(capsys.readouterr().out)["self_check"]
    assert check.pop("ok") is False
    assert [case["ok"] for case in check.values()].count(False) == cases


def test_the_self_check_sees_dropout_at_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward agree on the mask, and what is kept is scaled as it should be; it is only too much."""
    plan_by(monkeypatch, "shrink", "x_pass", "expand", threshold=lambda p: dropout_threshold(p) // 2)
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    check = self_check("cpu")
    case = check["fp32 adapters, dropout 0.25"]
    assert check["ok"] is case["ok"] is False and case["kept"] > 0.85
    assert all(case["error"][name] <= 1.25 * case["plain"][name] for name in case["error"])


@pytest.mark.parametrize("M", [8, 40])
def test_each_op_is_told_by_the_row_and_the_tile_of_its_launch(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the table's rows, *split* and *fused*: what is looked up to tell a path is what the ops then look up."""
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    K, N, R = 24, 40, 4
    told: set[tuple[Any, ...]] = set()
    ran: set[tuple[Any, ...]] = set()

    def spy(own: Any, into: set[tuple[Any, ...]]) -> Any:
        def look_up(*inputs: Any, **options: Any) -> Any:
            into.add((own.__name__, *inputs[: 7 if own is strategy else 6]))
            return own(*inputs, **options)

        look_up.__name__ = own.__name__
        return look_up

    own = strategy, tile
    x = torch.randn(M, K, requires_grad=True)
    monkeypatch.setattr(ops.kernels, "strategy", spy(own[0], told))
    monkeypatch.setattr(ops.kernels, "tile", spy(own[1], told))
    decisions = _ops(x, N, R)
    monkeypatch.setattr(linear, "strategy", spy(own[0], ran))
    plan_by(monkeypatch, "expand", tile=spy(own[1], ran))
    w, a, b, v, c, d = (torch.randn(s, requires_grad=s[0] == R or s[1] == R) for s in (
        (N, K), (R, K), (N, R), (K, N), (R, N), (K, R)
    ))  # fmt: skip
    layer, down = functional.Projection(w, None, a, b, 0.5), functional.Projection(v, None, c, d, 0.5)
    three = functional.lora_linear_group(x, [w] * 3, [None] * 3, [a] * 3, [b] * 3, [0.5] * 3)
    for y in (
        functional.lora_linear(x, w, None, a, b, 0.5),
        functional.lora_update(torch.randn(M, N), x.detach(), a, b, 0.5),
        torch.cat(three, 1),
        functional.lora_gated_mlp(x, layer, layer, down, "silu"),
    ):
        y.square().sum().backward()
    many = {look for look in told if look[1].startswith("multi")}
    assert {look[1:2] + look[4:6] for look in many} == {
        ("multi_expand", M, N), ("multi_expand", M, K), ("multi_linear", M, N),
    }  # fmt: skip
    assert told - many == ran
    assert {how.strategy for op, how in decisions.items() if op.startswith(("lora_linear", "lora_backward"))} == {
        "split" if M <= 16 else "fused"
    }


def test_few_rows_are_told_to_run_one_by_one_and_on_a_gpu_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but a bank's and jobs' rows, which are the kernels'."""
    told = _paths("cpu")["one token: M 1, K 4096, N 4096, R 16, bf16"]
    by_torch = {op for op, how in told.items() if how.startswith("torch (one by one; ")}
    assert by_torch == {op for op in told if op.startswith(("lora_group", "lora_gated"))}
    monkeypatch.setattr(ops, "triton_unavailable", lambda _: None)
    monkeypatch.setattr(ops.kernels, "arch", lambda _: "sm_90")
    with FakeTensorMode():
        few = _ops(torch.empty(4, 64, device="cuda", dtype=torch.bfloat16), 96, 4)
    assert {op for op, how in few.items() if how.path == "triton"} == {
        op for op in told if op.startswith(("jobs", "multi"))
    }


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
