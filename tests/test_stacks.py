"""Requests of like rank in one product: which ranks go together, and that none are padded to another class's."""

from __future__ import annotations

import itertools
import random

import pytest
from banked import RANKS, bank_with, model_of, names, tenants_of
from models import base_model, batch, logits

from fastlora import eager, stacks
from fastlora.stacks import classes


def padded(ranks: list[int], sizes: list[int]) -> int:
    """Rank rows that classes of these sizes read."""
    ends = list(itertools.accumulate(sizes))
    return sum(ranks[end - size] * size for size, end in zip(sizes, ends, strict=True))


def test_classes_spare_what_they_cost() -> None:
    """Each part is whole and in order, a cut spares `least` rows or more, and no further cut would."""
    draw = random.Random(0)
    for _ in range(300):
        ranks = sorted(draw.choices([1, 4, 8, 16, 64, 256], k=draw.randint(1, 40)), reverse=True)
        least = draw.choice([1, 30, 500, 10**6])
        sizes = classes(ranks, least)
        assert sum(sizes) == len(ranks) and min(sizes) > 0
        assert padded(ranks, sizes) <= padded(ranks, [len(ranks)]) - least * (len(sizes) - 1)
        for at, size in enumerate(sizes):
            for first in range(1, size):
                finer = [*sizes[:at], first, size - first, *sizes[at + 1 :]]
                assert padded(ranks, finer) > padded(ranks, sizes) - least


def test_classes_of_usual_batches() -> None:
    assert classes([], 1) == []
    assert classes([16] * 32, 1) == [32]
    assert classes([64] + [1] * 31, 200) == [1, 31]
    assert classes([64] * 8 + [32] * 8 + [16] * 8 + [8] * 8, 200) == [8, 8, 16]


@pytest.mark.parametrize("apart", [False, True])
def test_no_rank_is_padded_where_that_costs_more(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers' padding is cheaper than calls; where calls cost nothing, each rank has a product of its own."""
    if apart:
        monkeypatch.setattr(stacks, "CLASS_BYTES", 1)
    widths: list[tuple[int, int]] = []
    monkeypatch.setattr(
        eager, "multi_update_", lambda ys, x, requests, rows, a, bs, biases: widths.append((len(a), bs[0].shape[1]))
    )
    bank = bank_with(tenants_of(base_model("llama"), "llama"))
    mapping = [4, 0, None, 3, 0, 3, 3]  # 64, 1, the base, 16, 1, 16, 16
    with bank.use(adapter_names=names(mapping)):
        logits(model_of(bank), batch("llama", rows=len(mapping)))
    assert RANKS == (1, 4, 7, 16, 64)
    assert set(widths) == ({(1, 64), (1, 16), (1, 1)} if apart else {(6, 64)})
