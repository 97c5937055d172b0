"""The lab, run as a person runs it but tiny: what it measures, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

import fastlora

ROOT = Path(__file__).parents[1]
LAB = ROOT / "examples" / "dialogue_summarization"
sys.path += [str(ROOT / "examples"), str(LAB)]

import dialogues  # noqa: E402
import document  # noqa: E402
import measures  # noqa: E402
import store  # noqa: E402
import table  # noqa: E402
from bases import readings  # noqa: E402
from judge import Judge  # noqa: E402
from methods import attention_of, sweep  # noqa: E402
from tinybase import Size, build_t5, build_tokenizer  # noqa: E402
from training import IGNORED, pair, row  # noqa: E402

FEW = ["--steps", "4", "--base-steps", "4", "--held-out", "6", "--general", "4", "--rounds", "2"]
SOME = "zero-shot,one-shot,full,lora all 16,prompt 20,lora all 16 + prompt 20,topic"
TIMES = re.compile(r"seconds|load|commit")


def start(*words: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(LAB), "--quick", *FEW, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: Any) -> tuple[int, str, str]:
    with start(*words) as process:
        said, complained = process.communicate(timeout=300)
    return process.returncode, said, complained


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run left everything that was killed once in the middle of a cell, and then started again."""
    out = tmp_path_factory.mktemp("lab") / "out"
    with start("--out", out, "--only", SOME) as process:
        deadline = time.monotonic() + 200
        while not list(out.glob("cells/causal-lora-all-16-0.part/*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir() if not path.suffix}
    assert "causal-full-1" in before and "causal-lora-all-16-0" not in before
    assert not (out / "results.json").exists()
    code, said, complained = run("--out", out, "--only", SOME)
    assert code == 0, complained
    done = re.findall(r"\d+/\d+  (\S+)", said)
    assert not {*done} & {*before}, "a finished cell ran again"
    after = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert before.items() <= after.items() and {*after} == {*before, *done}
    (out / "said").write_text(said)
    (out / "complained").write_text(complained)
    return out


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def lasting(value: Any) -> Any:
    """Without times and what else differs by nature."""
    if isinstance(value, dict):
        return {key: lasting(v) for key, v in value.items() if not TIMES.search(key)}
    return value


def test_a_killed_run_ends_as_one_that_was_not(out: Path, results: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(out / "bases", tmp_path / "bases")
    shutil.copy(out / "settings.json", tmp_path)
    rows = "full,lora all 16,prompt 20"
    code, _, complained = run("--out", tmp_path, "--only", rows)
    assert code == 0, complained
    again = {
        c["row"] + c["model"] + str(c["seed"]): c for c in json.loads((tmp_path / "results.json").read_text())["cells"]
    }
    assert len(again) == 2 * 2 * 2 + 1
    for cell in results["cells"]:
        if cell["row"] in rows.split(","):
            assert lasting(cell) == lasting(again[cell["row"] + cell["model"] + str(cell["seed"])])


def test_seeds_differ(results: dict[str, Any]) -> None:
    for method in ("full", "lora all 16"):
        one, two = (c["training_losses"] for c in results["cells"] if (c["model"], c["row"]) == ("causal", method))
        assert one != two


def test_each_cell_says_what_it_costs(results: dict[str, Any]) -> None:
    by = {(c["model"], c["row"]): c for c in results["cells"] if c["seed"] == 0}
    for model in ("causal", "seq2seq"):
        zero, full, lora = (by[model, row] for row in ("zero-shot", "full", "lora all 16"))
        assert zero["trainable"] == 0 and full["trainable"] == full["total"] == zero["total"]
        assert lora["total"] == full["total"] + lora["trainable"] and 0 < lora["trainable"] < full["trainable"]
        assert full["file"] > lora["file"] > 4 * lora["trainable"]
        for cell in (full, lora):
            assert cell["peak"] > 4 * cell["total"] + 12 * cell["trainable"], "weights, gradients and two moments"
            assert len(cell["training_losses"]) == cell["steps"] == 4 and cell["curve"][-1][0] == 4
            assert cell["training_seconds"] > 0 and cell["training_cpu_seconds"] > 0
    assert by["causal", "prompt 20"]["trainable"] == 20 * 64
    both = by["causal", "lora all 16 + prompt 20"]
    assert both["trainable"] == by["causal", "lora all 16"]["trainable"] + 20 * 64
    assert by["causal", "zero-shot"]["losses"] != by["causal", "one-shot"]["losses"]
    for cell in results["cells"]:
        assert len(cell["losses"]) == len(cell["rouge1"]) == len(cell["bleu"]) == 6 and len(cell["general"]) == 4


def test_swapping_is_exact_and_merging_writes_the_same(results: dict[str, Any]) -> None:
    served = results["serving"]
    assert served["swaps"] == served["swaps"] | {"exact": True, "base_exact": True, "differ": True, "switches": 20}
    assert served["same_tokens"] == {"merged": 6, "of": 6} and served["task"] == "topic"
    assert set(served["latency"]) == {"base", "merged", "LoRA, PEFT", "LoRA, fastlora"}
    again = [cell["base_again"] for cell in results["cells"] if cell["kind"] not in ("shots", "full")]
    assert len(again) == 7 and all(again)


def test_what_it_says_and_draws(out: Path, results: dict[str, Any]) -> None:
    said = (out / "said").read_text()
    assert "lora all 16 + prompt 20" in said and "results.json" in said
    assert "\r" not in said + (out / "complained").read_text(), "progress belongs on a terminal"
    for name in ("curves", "parameters", "forgotten", "neighbours"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.part"))


def test_other_settings_are_not_mixed_in(out: Path, capsys: Any) -> None:
    assert lab_main()(["--quick", *FEW, "--out", str(out), "--batch", "4"]) == 2
    complained = capsys.readouterr().err.splitlines()
    assert complained[-1].startswith(f"error: --out: {out} holds a run with batch = 8, wanted 4")


@pytest.fixture(scope="module")
def gpt2(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of another family, with the tokenizer of the run's."""
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copytree(out / "bases" / "causal", folder, dirs_exist_ok=True)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=1024, vocab_size=1000, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "seq2seq"])
def test_a_model_and_dialogues_of_ones_own(kind: str, out: Path, gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    made = list(itertools.islice(dialogues.dialogues(5), 20))
    lines = [json.dumps({"dialogue": e.dialogue.replace("\n", "\r\n"), "summary1": e.summary}) for e in made]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(lines))
    model = gpt2 if kind == "gpt2" else out / "bases" / "seq2seq"
    rows = "zero-shot,few-shot,lora attention 4,prompt 20,speakers"
    words = ("--model", model, "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out", "--only", rows)
    code = lab_main()(["--quick", *FEW, *map(str, words), "--seeds", "1"])
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["row"] for c in found["cells"]] == rows.split(",")
    assert found["attention"] == {"given": ["c_attn"] if kind == "gpt2" else ["q", "k", "v", "o"]}
    assert found["cells"][2]["losses"] != found["cells"][0]["losses"] and found["dialogues"] == 14


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got an empty file"),
        ("\n  \n", "got an empty file"),
        (
            '{"dialogue": "A: b", "summary": "c"}\n\n{"dialogue": "A: b", "topic": "d"}',
            "row 3: got dialogue, topic, wanted",
        ),
        ('{"dialogue": "A: b", "summary": " "}', "row 1: got dialogue, summary, wanted texts"),
        ('{"dialogue": "A: b", "summary": 7}', "row 1: got dialogue, summary, wanted texts"),
        ("[1]", "row 1: got list, wanted"),
        ('{"dialogue": ', "row 1: got no JSON"),
        ('{"dialogue": "A: b", "summary": "c"}', "got 1 dialogues, wanted twice the 16 held out"),
        (None, "No such file"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(text: str | None, said: str, tmp_path: Path, capsys: Any) -> None:
    main = lab_main()
    if text is not None:
        (tmp_path / "mine.jsonl").write_text(text)
    assert main(["--quick", "--data", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "out")]) == 2
    complained = capsys.readouterr().err.splitlines()
    assert len(complained) == 1 and complained[0].startswith("error: ") and said in complained[0]
    assert not (tmp_path / "out").exists()


def lab_main() -> Any:
    """The lab's main, in this process."""
    spec = importlib.util.spec_from_file_location("lab_main", LAB / "__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attention", "c_attn,query"], "got 'query', which no linear layer is called; the model has"),
        (["--only", "lora all 5"], "--only: got lora all 5, wanted some of few-shot"),
        (["--model", "no/such/folder"], "--model no/such/folder: "),
    ],
)
def test_what_the_model_lacks_is_named(words: list[str], said: str, gpt2: Path, tmp_path: Path, capsys: Any) -> None:
    assert lab_main()(["--quick", "--model", str(gpt2), "--out", str(tmp_path / "out"), *words]) == 2
    complained = capsys.readouterr().err.splitlines()
    assert complained[-1].startswith("error: ") and said in complained[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_without_attention_layers_that_are_known() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64))
    assert attention_of(model) == ["query_key_value"]
    layer = model.transformer.h[0].self_attention
    layer.strange = layer.query_key_value
    del layer.query_key_value
    with pytest.raises(
        ValueError, match=r"which no linear layer is called; the model has .*strange; name its attention"
    ):
        attention_of(model)
    assert attention_of(model, ["strange"]) == ["strange"]


def test_numbers_of_the_command_line(capsys: Any) -> None:
    for words in (["--steps", "0"], ["--seeds", "many"]):
        with pytest.raises(SystemExit, match="2"):
            lab_main()(words)
        assert "wanted a whole number ≥ 1" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"--out: .* holds other files"):
        store.settle(tmp_path, {})
    with pytest.raises(KeyError), store.whole(tmp_path / "cell") as part:
        (part / "half").touch()
        raise KeyError
    assert not (tmp_path / "cell").exists()
    with store.whole(tmp_path / "cell") as part:
        assert not list(part.iterdir()), "what a killed run left is gone"
    assert (tmp_path / "cell").is_dir()


def test_losses_are_the_models_own(out: Path) -> None:
    made = list(itertools.islice(dialogues.dialogues(2), 5))
    for kind, make, of in (("causal", row, AutoModelForCausalLM), ("seq2seq", pair, T5ForConditionalGeneration)):
        tokenizer = AutoTokenizer.from_pretrained(out / "bases" / kind)
        model = of.from_pretrained(out / "bases" / kind)
        rows = [make(tokenizer, [(e.prompt, False), (f" {e.summary}", True)], 512) for e in made]
        for prompted in (False, True):
            if prompted:
                fastlora.add_soft_prompt(model, 3)
            found = measures.losses(model, rows, tokenizer.pad_token_id)
            for (loss, tokens, _), r in zip(found, rows, strict=True):
                alone = model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss
                assert tokens == sum(label != IGNORED for label in r["labels"])
                assert loss / tokens == pytest.approx(alone.item(), rel=1e-3)


def test_topics_and_what_a_base_reads() -> None:
    made = list(itertools.islice(dialogues.dialogues(3), 400))
    assert len({e.topic for e in made}) == len(dialogues.SCENES)
    reads = readings(made, seed=0)
    assert reads == readings(made, seed=0) != readings(made, seed=1)
    texts = ["".join(text for text, _ in parts) for parts in reads]
    assert not any(e.summary in text for e, text in zip(made, texts, strict=True)), "a summary was given away"
    for said in ("Questions:", "Name the speakers", "Repeat the last line"):
        assert sum(said in text for text in texts) > 40
    plain = dialogues.Example("A: one\nB: two\nA: three", "so")
    (parts,) = readings([plain], seed=0)
    assert "".join(text for text, _ in parts) == plain.dialogue and [learnt for _, learnt in parts] == [False, True]


def test_pairs_for_an_encoder_and_its_decoder() -> None:
    tokenizer = build_tokenizer(["Hello there, who is it? It is me."], 300)
    found = pair(tokenizer, [("Hello", False), (" it", True), (" there", False), (" is", True)], 64)
    assert tokenizer.decode(found["input_ids"]) == "Hello there"
    assert tokenizer.decode(found["labels"]) == " it is<eos>"
    model = build_t5(tokenizer, Size(hidden=16, layers=2, heads=2))
    judge = Judge(tokenizer, [found] * 2, ["it is"] * 2)
    assert len(judge.write(model)) == 2 and all(len(tokens) <= 3 for tokens in judge.write(model))


def test_the_sweep_is_the_one_that_was_promised() -> None:
    rows = {cell.row for cell in sweep("m", 3, "topic")}
    ranks = {f"lora {where} {r}" for where in ("all", "attention") for r in (4, 8, 16, 32, 64)}
    assert rows == ranks | {f"prompt {n}" for n in (20, 50, 100)} | {"lora all 16 + prompt 20", "full", "topic"} | {
        "zero-shot", "one-shot", "few-shot"
    }  # fmt: skip
    headline = [cell for cell in sweep("m", 3, "topic") if cell.row in ("full", "lora all 16", "prompt 50")]
    assert len(headline) == 9 and len({cell.name for cell in sweep("m", 3, "topic")}) == len(sweep("m", 3, "topic"))


@pytest.mark.slow
def test_the_quick_run_is_a_whole_one(tmp_path: Path) -> None:
    """As documented: every row, and the page from it; three minutes on two quiet cores."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = [sys.executable, str(LAB), "--quick", "--out", str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, timeout=1200)
    results = tmp_path / "out" / "results.json"
    assert document.main([str(results), "--docs", str(tmp_path / "docs")]) == 0
    for line in table.lines(json.loads(results.read_text())):
        if line.row == "full":
            assert line.score("loss").value < line.base.score("loss").value  # type: ignore[union-attr]
