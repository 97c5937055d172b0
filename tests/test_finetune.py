"""The main job, run as a user runs it but small: what it claims to show is shown."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import dialogues  # noqa: E402
import finetune  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a quick run left its adapter and report."""
    out = tmp_path_factory.mktemp("finetune")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_losses_fall(report: dict[str, Any]) -> None:
    for losses in (report["pretraining"], report["training"]):
        tenth = len(losses) // 10
        assert sum(losses[-tenth:]) < sum(losses[:tenth])
    assert report["after"]["loss"] < report["before"]["loss"]


def test_losses_equal_pefts(report: dict[str, Any]) -> None:
    both = report["beside"]["losses"]
    assert len(both["peft"]) == len(both["fastlora"]) > 1
    assert both["peft"] == pytest.approx(both["fastlora"], rel=report["beside"]["tolerance"])
    assert both["peft"][-1] != both["peft"][0], "nothing was trained"


def test_every_layer_was_ours_and_keeps_less(report: dict[str, Any]) -> None:
    assert report["patch"]["patched"] == 14
    assert report["patch"]["skipped"] == {}
    assert report["steps"]["p = 0.05"]["MiB kept for backward"]["ratio"] < 1


def test_plain_peft_writes_the_same(report: dict[str, Any]) -> None:
    same = report["same_tokens"]
    assert same["loaded"] == same["merged"] == same["held_out"] > 0


def test_adapter_is_pefts_format(out: Path) -> None:
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    ids = torch.arange(2, 34)[None]
    plain = base(ids).logits
    model = PeftModel.from_pretrained(base, out / "adapter")
    assert not torch.equal(model(ids).logits, plain), "the adapter says nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "got an empty file, wanted a dialogue a line"),
        ("not JSON", "row 1: got no JSON"),
        ('{"summary": "Hi."}', "row 1: got summary, wanted texts `dialogue` and `summary`"),
        ('{"dialogue": "A: b", "summary": "c"}', "got 1 dialogues, wanted more than the 8 held out"),
    ],
)
def test_bad_data_is_one_line(text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "mine.jsonl").write_text(text)
    words = ("--quick", "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        finetune.main([*map(str, words)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --data: ") and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["nothing", "no config", "no weights", "broken weights"])
def test_a_bad_model_is_one_line(broken: str, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "base"
    if broken != "nothing":
        shutil.copytree(out / "base", model)
        (model / ("config.json" if broken == "no config" else "model.safetensors")).unlink()
    if broken == "broken weights":
        (model / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["--quick", "--model", str(model), "--out", str(tmp_path / "out")])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --model {model}: ")
    assert not (tmp_path / "out").exists()


def test_dialogues_are_the_seeds_and_never_twice() -> None:
    first, second = (list(itertools.islice(dialogues.dialogues(seed=3), 500)) for _ in range(2))
    assert first == second
    assert len({example.summary for example in first}) == len({example.dialogue for example in first}) == 500


def test_the_sample_of_the_docstring_is_what_is_made() -> None:
    example = next(dialogues.dialogues(seed=57))
    assert dialogues.__doc__ is not None
    assert f"{example.dialogue}\n\n-> {example.summary}" in textwrap.dedent(dialogues.__doc__.split(" prints\n")[1])


def test_every_ending_plays_and_its_facts_were_said() -> None:
    for scene in dialogues.SCENES:
        for ending in scene.endings:
            for seed in range(20):
                example = dialogues.play(scene, ending, random.Random(seed))  # a slot that no turn drew is a KeyError
                assert example.summary and example.asks
