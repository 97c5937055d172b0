"""A soft prompt and words: which it begins as, and which lie nearest to what it became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY
from tolerance import assert_same, relative_error
from torch import nn

from fastlora import SoftPrompt


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 3 for letter in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i + ord("a") - 3) for i in ids]


def test_how_a_prompt_begins() -> None:
    embedding = nn.Embedding(VOCABULARY, 64)
    nn.init.normal_(embedding.weight, std=0.02)
    table = embedding.weight.detach()
    assert float(SoftPrompt(500, embedding).weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    drawn = SoftPrompt(200, embedding, "vocab").weight
    which = (drawn[:, None] == table).all(-1).float().argmax(1)
    assert_same(drawn, table[which])
    assert len(which.unique()) > VOCABULARY / 2
    said = SoftPrompt(5, embedding, "text", text="abc", tokenizer=Letters(), encoder_decoder=True)
    assert_same(said.weight, table[[3, 4, 5, 3, 4]])
    assert_same(said.decoder_weight, table[[5, 3, 4, 5, 3]])
    assert_same(SoftPrompt(2, embedding, "text", text="abc", tokenizer=Letters()).weight, table[[3, 4]])
    assert SoftPrompt(2, embedding.bfloat16()).weight.dtype == torch.float32


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_the_nearest_tokens_are_those_that_a_full_comparison_finds(metric: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("fastlora.nearest.CHUNK", 7)
    embedding = nn.Embedding(VOCABULARY, 16)
    prompt = SoftPrompt(5, embedding)
    rows, table = prompt.weight.detach().double(), embedding.weight.detach().double()
    full = rows @ table.T
    if metric == "cosine":
        full = full / rows.norm(dim=1)[:, None] / table.norm(dim=1)
    if metric == "euclidean":
        full = -(rows[:, None] - table).norm(dim=-1)
    found = prompt.nearest_tokens(3, metric)
    best = full.topk(3)
    assert_same(found.ids, best.indices)
    assert relative_error(found.scores, best.values * (-1 if metric == "euclidean" else 1)) < 1e-6
    unit = nn.functional.normalize(table, dim=1)
    pairs = unit[found.ids] @ unit[found.ids].mT
    assert relative_error(found.tightness, (pairs.sum((1, 2)) - 3) / 6) < 1e-5
    assert found.background == pytest.approx(float(((unit @ unit.T).sum() - VOCABULARY) / VOCABULARY / 63), rel=1e-3)


def test_neighbours_as_a_table_and_a_plot(tmp_path: Path) -> None:
    embedding = nn.Embedding(20, 16)
    embedding.weight.data[3:6] = torch.randn(16) + 0.01 * torch.randn(3, 16)  # a, b and c mean the same
    prompt = SoftPrompt(2, embedding, "text", text="ak", tokenizer=Letters())
    found = prompt.nearest_tokens(3, tokenizer=Letters())
    assert found.words[0][0] == "a" and {*found.words[0]} == {*"abc"} and found.words[1][0] == "k"
    assert float(found.tightness[0]) > 0.99 > 0.8 > float(found.tightness[1])
    lines = str(found).splitlines()
    assert len(lines) == 3 and "tightness" in lines[0] and "a  1.000" in lines[1] and "k  1.000" in lines[2]
    assert found.coordinates.shape == (2, 4, 2)
    spread = found.coordinates[0].var(0).sum() / found.coordinates.flatten(0, 1).var(0).sum()
    assert spread < 0.01, "a cluster is one in the plot"
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
