"""What no gradient comes back to has none, as in plain torch: of zeros AdamW makes a step, by decay and by momentum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from fastlora import functional as F

K, N, R = 16, 24, 4


class Stop(torch.autograd.Function):
    """Sends back nothing, as a reentrant checkpoint does to an argument that it did not use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


def projection(n: int, k: int) -> F.Projection:
    a, b = torch.randn(R, k, requires_grad=True), torch.randn(n, R, requires_grad=True)
    bias = torch.randn(n, requires_grad=True)
    return F.Projection(torch.randn(n, k, requires_grad=True), bias, a, b, 0.5, torch.randn(n, requires_grad=True))


def linear(x: Tensor, *layers: F.Projection) -> Tensor:
    weight, bias, a, b, scaling, lora_bias, _ = layers[0]
    return F.lora_linear(x, weight, bias, a, b, scaling, lora_bias=lora_bias)


def frozen(x: Tensor, *layers: F.Projection) -> Tensor:
    weight, bias, a, b, scaling, _, _ = layers[0]
    return F.lora_linear(x, weight.detach(), bias.detach(), a, b, scaling)


def update(x: Tensor, *layers: F.Projection) -> Tensor:
    weight, bias, a, b, scaling, lora_bias, _ = layers[0]
    y = nn.functional.linear(x, weight, bias)
    return F.lora_update(y, x, a, b, scaling, lora_bias=lora_bias)


def group(x: Tensor, *layers: F.Projection) -> Tensor:
    weights, biases, as_, bs, scalings, lora_biases, _ = zip(*layers[:2], strict=True)
    return torch.cat(F.lora_linear_group(x, weights, biases, as_, bs, scalings, lora_biases=lora_biases), -1)


def gated(x: Tensor, *layers: F.Projection) -> Tensor:
    return F.lora_gated_mlp(x, *layers, "silu")


def jobs(x: Tensor, *layers: F.Projection) -> Tensor:
    weight, bias, a, b, scaling, _, _ = layers[0]
    return F.jobs_linear(x, weight.detach(), bias.detach(), [a], [b], [scaling], [0])


def jobs_update(x: Tensor, *layers: F.Projection) -> Tensor:
    weight, bias, a, b, scaling, _, _ = layers[0]
    return F.jobs_linear(x, weight, bias, [a], [b], [scaling], [0])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("few", [0, 2**17])
@pytest.mark.parametrize("layer", [linear, frozen, update, group, gated, jobs, jobs_update])
def test_no_rule_makes_zeros(
    layer: Callable[..., Tensor], few: int, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor fails, where it is the op's own."""
    for module in ("ops", "eager.few"):
        monkeypatch.setattr(f"fastlora.{module}.FEW_INPUTS", few)
    for module in ("linear", "group", "gated", "jobs"):
        monkeypatch.setattr(f"fastlora.functional.{module}.traced", lambda: traced)
    layers = projection(N, K), projection(N, K), projection(K, N)
    x, other = torch.randn(3, K, requires_grad=True), torch.ones(1, requires_grad=True)
    (Stop.apply(layer(x, *layers)).sum() + other).backward()
    assert other.grad is not None
    for tensors in ([x], *layers):
        assert all(t.grad is None for t in tensors if isinstance(t, Tensor))


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
def test_the_optimizer_leaves_alone_what_peft_leaves_alone(adapters: list[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return Stop.apply(self.one(x)) + self.two(x)

    config = LoraConfig(r=R, target_modules=["one", "two"], init_lora_weights=False)
    model = get_peft_model(Two(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(adapters)
    ours = copy.deepcopy(model)
    fastlora.patch(ours, strict=True)
    x = torch.randn(5, K)
    for each in (model, ours):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1, weight_decay=0.5)
        each(x).sum().backward()
        optimizer.step()
    for (name, theirs), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert (theirs.grad is None) == (mine.grad is None), name
        torch.testing.assert_close(mine, theirs, msg=name)
