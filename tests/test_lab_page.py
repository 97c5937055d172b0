"""The lab's statistics, against the long way round, and its page, written from a run's JSON and nothing else."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "dialogue_summarization")]

import bootstrap  # noqa: E402
import dialogues  # noqa: E402
import document  # noqa: E402
import measures  # noqa: E402
import table  # noqa: E402
from judge import Judge  # noqa: E402


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The run that docs/lab.md is of."""
    found: dict[str, Any] = json.loads((ROOT / "docs" / "lab" / "generated.json").read_text())
    return found


def by_hand(values: list[float], count: int) -> tuple[float, float]:
    """The percentile interval of a mean: a loop for each resample, a sort, and a line between two ranks."""
    picked = np.random.default_rng(0).integers(len(values), size=(count, len(values))).tolist()
    means = sorted(sum(values[i] for i in which) / len(values) for which in picked)

    def at(share: float) -> float:
        place = share * (count - 1)
        low = math.floor(place)
        return means[low] + (place - low) * (means[low + 1] - means[low])

    return at(0.025), at(0.975)


def test_intervals_are_those_of_a_loop() -> None:
    values = np.random.default_rng(1).beta(2, 3, size=40)
    found = bootstrap.interval(bootstrap.mean, values[:, None], count=500)
    assert (found.low, found.high) == pytest.approx(by_hand(values.tolist(), 500))
    assert found.value == pytest.approx(values.mean())
    other = values - np.random.default_rng(2).normal(0.05, 0.01, size=40)
    paired = bootstrap.interval(bootstrap.mean, values[:, None], other[:, None], count=500)
    assert (paired.low, paired.high) == pytest.approx(by_hand((values - other).tolist(), 500))
    assert paired.sure and paired.high - paired.low < (found.high - found.low) / 5, "pairs cancel what both have"


def test_an_interval_covers_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(3), 0
    for _ in range(300):
        found = bootstrap.interval(bootstrap.mean, rng.normal(size=(60, 1)), count=300)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_intervals_apart() -> None:
    one, two, three = (bootstrap.Interval(x, x - 1, x + 1) for x in (0.0, 1.5, 2.5))
    assert one.apart(three) and three.apart(one) and not one.apart(two) and not two.apart(three)
    assert two.sure is three.sure is True and not one.sure


def test_loss_is_weighed_by_tokens() -> None:
    figures = np.array([[10.0, 2], [3.0, 6], [4.0, 1]])
    found = bootstrap.interval(bootstrap.ratio, figures, count=200)
    assert found.value == pytest.approx(17 / 9)
    draws = np.random.default_rng(0).integers(3, size=(200, 3))
    ratios = [sum(figures[i, 0] for i in d) / sum(figures[i, 1] for i in d) for d in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))


def test_bleu_of_resamples_is_sacrebleus_own() -> None:
    references = [example.summary for example in itertools.islice(dialogues.dialogues(1), 12)]
    rng = random.Random(0)
    said = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in references]
    judge = Judge(None, [], references)  # type: ignore[arg-type]
    found = measures.scores(judge, said)
    draws = bootstrap.resamples(12, 20)
    ours = bootstrap.bleu(np.array(found["bleu"], dtype=float)[draws])
    for score, which in zip(ours, draws, strict=True):
        whole = BLEU().corpus_score([said[i] for i in which], [[references[i] for i in which]])
        assert score == pytest.approx(whole.score) and 5 < score < 95
    assert found["rouge1"] == [round(x, 4) for x in judge.rouge(said)["rouge1"]]


def test_seeds_are_put_together_dialogue_by_dialogue(results: dict[str, Any]) -> None:
    line = next(x for x in table.lines(results) if (x.model, x.row) == ("causal", "full"))
    assert line.base is not None and len(line.cells) > 1
    assert line.score("rougeL").value == pytest.approx(np.mean([np.mean(c["rougeL"]) for c in line.cells]))
    assert line.seeds("rougeL") == pytest.approx([np.mean(c["rougeL"]) for c in line.cells])
    each = [pair for c in line.cells for pair in c["losses"]]
    assert line.score("loss").value == pytest.approx(sum(x[0] for x in each) / sum(x[1] for x in each))
    for measure in ("loss", "bleu", "rouge1"):
        gain = line.score(measure).value - line.base.score(measure).value
        assert line.gain(measure).value == pytest.approx(gain)


def line_of(r: int, score: float, rng: np.random.Generator) -> table.Line:
    values = np.clip(score + 0.05 * rng.standard_normal(100), 0, 1).tolist()
    return table.Line("m", f"lora all {r}", ({"r": r, "rougeL": values},), None)


def test_where_the_plateau_begins() -> None:
    rng = np.random.default_rng(0)
    rising = [line_of(r, score, rng) for r, score in ((4, 0.2), (8, 0.4), (16, 0.6), (32, 0.6), (64, 0.6))]
    assert document.plateau(rising) == (16, True)
    assert document.plateau([line_of(r, r / 100, rng) for r in (4, 8, 16, 32, 64)]) == (64, False)
    assert document.plateau([line_of(r, 0.5 - r / 200, rng) for r in (4, 8, 64)]) == (4, True)


def test_the_page_is_written_from_the_json_alone(results: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    docs = tmp_path / "docs"
    assert document.main([str(tmp_path / "results.json"), "--docs", str(docs)]) == 0
    first = (docs / "lab.md").read_text()
    assert {path.name for path in (docs / "lab").iterdir()} == {"generated.json"} | {
        f"{name}.png" for name in ("rank", "curves", "parameters", "forgotten", "neighbours")
    }
    assert all((docs / path).exists() for path in re.findall(r"\]\((lab/\S+)\)", first))
    full = next(x for x in table.lines(results) if (x.model, x.row) == ("causal", "full"))
    scores = f"{table.cell(full.score('loss'))} | {table.cell(full.score('rouge1'))}"
    assert f"| full | {len(full.cells)} | {scores} |" in first and f"{full.first['trainable']:,}" in first
    real = results | {"settings": results["settings"] | {"data": [["mine.jsonl", "0"]]}}
    secret = real["cells"][0]["dialogue"].splitlines()[0]
    assert secret in first
    (tmp_path / "results.json").write_text(json.dumps(real))
    assert document.main([str(tmp_path / "results.json"), "--docs", str(docs)]) == 0
    assert (docs / "lab.md").read_text().count("## 8. Real dialogues") == 1
    kept = (docs / "lab" / "real.json").read_text()
    assert secret not in kept and not any(f'"{key}":' in kept for key in document.TEXTS)


def test_the_page_wants_a_whole_run(results: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    assert document.main(["--docs", str(tmp_path)]) == 2
    assert "got no run on generated dialogues" in capsys.readouterr().err
    some = results | {"cells": [c for c in results["cells"] if c["row"] != "full"]}
    (tmp_path / "results.json").write_text(json.dumps(some))
    assert document.main([str(tmp_path / "results.json"), "--docs", str(tmp_path)]) == 2
    assert "wanted one of all rows" in capsys.readouterr().err
    assert not (tmp_path / "lab.md").exists()


def test_the_page_in_the_docs_is_that_of_its_json(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "lab", tmp_path / "lab")
    assert document.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "lab.md").read_text() == (ROOT / "docs" / "lab.md").read_text()


def test_the_run_in_the_docs_holds_what_was_promised(results: dict[str, Any]) -> None:
    of = {(line.model, line.row): line for line in table.lines(results)}
    assert len(results["cells"][0]["losses"]) >= 200
    for model in ("causal", "seq2seq"):
        base = of[model, table.BASE]
        for method in ("full", "lora all 16"):
            assert len(of[model, method].cells) == 3
            for measure in table.TITLES:
                assert of[model, method].score(measure).low > base.score(measure).high
    swaps = results["serving"]["swaps"]
    assert swaps["exact"] and swaps["base_exact"] and swaps["differ"]
