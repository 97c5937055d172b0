"""Siblings in training: masks of their own, the losses and the steps of PEFT, and one backward for all."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from grouping import K, group_calls, pair, wrap
from models import lora_layers, peft_model
from test_peft_training import examples, losses_as_results, trainer_losses
from tolerance import assert_all_close
from torch import Tensor, nn

import fastlora
from fastlora import functional

pytestmark = pytest.mark.usefixtures("groups_alone")


def test_masks_of_members_are_independent() -> None:
    """Through a lora_A of ones and a base of zeros, y counts what was kept: its rate, and none like another's."""
    p, width = 0.25, 4096

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.this, self.that = nn.Linear(width, 1, bias=False), nn.Linear(width, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.this(x), self.that(x)), -1)

    model = wrap(Wide(), r=1, lora_alpha=1, lora_dropout=p).train()
    fastlora.patch(model)
    for layer in lora_layers(model).values():
        for parameter in layer.parameters():
            nn.init.zeros_(parameter) if parameter is layer.base_layer.weight else nn.init.ones_(parameter)
    with group_calls() as calls:
        counts = model(torch.ones(500, width)).detach().double() * (1 - p) / width - (1 - p)
    assert calls.call_count == 1
    sigma = (p * (1 - p) / width) ** 0.5
    assert (counts.mean(0).abs() < 5 * sigma / 500**0.5).all(), "wrong rate"
    assert (counts.std(0) / sigma - 1).abs().max() < 0.2, "not independent within a row"
    assert abs(float(torch.corrcoef(counts.t())[0, 1])) < 5 / 500**0.5, "the members share masks"


def test_with_dropout_losses_over_seeds_are_pefts() -> None:
    models, seeds = pair(lora_dropout=0.4), 400
    x, losses = torch.randn(5, K), []
    for model in models:
        model.train()
        each = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            with torch.no_grad():
                each.append(model(x).square().mean())
        losses.append(torch.stack(each).double())
    plain, actual = losses
    assert not torch.equal(plain, actual)
    assert abs(float((actual.mean() - plain.mean()) / ((actual.var() + plain.var()) / seeds).sqrt())) < 4
    assert abs(float((actual.std() / plain.std()).log())) * (seeds - 1) ** 0.5 < 5


def test_trainer_takes_pefts_steps(tmp_path: Path) -> None:
    model, data = peft_model(), examples()
    ours = copy.deepcopy(model)
    fastlora.patch(ours, strict=True)
    exact = trainer_losses(copy.deepcopy(model).double(), data, tmp_path)
    with group_calls() as calls:
        actual = trainer_losses(ours, data, tmp_path, gradient_checkpointing=True)
    assert calls.call_count == 5 * 4 * 2 and len(actual) == 5
    assert_all_close([tuple(map(losses_as_results, (actual, trainer_losses(model, data, tmp_path), exact)))])


def test_a_second_backward_says_what_to_do() -> None:
    """A group is one node: outputs backwarded one after the other need retain_graph, and nothing is silently wrong."""
    a, b = (functional.lora_linear_group(
        torch.randn(4, K), [torch.randn(8, K)] * 2, [None] * 2,
        [torch.randn(2, K, requires_grad=True)] * 2, [torch.randn(8, 2)] * 2, [1.0, 1.0],
    ))  # fmt: skip
    a.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        b.sum().backward()
