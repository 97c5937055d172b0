"""What a layer returns may be changed in place, as a plain layer's output may: nn.ReLU(inplace=True) behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerance import assert_same
from torch import Tensor, nn

import fastlora
from fastlora import functional as F

K, N, R = 16, 24, 4


def factors() -> tuple[Tensor, Tensor]:
    return torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)


def projection(n: int, k: int) -> F.Projection:
    a, b = torch.randn(R, k, requires_grad=True), torch.randn(n, R, requires_grad=True)
    return F.Projection(torch.randn(n, k), torch.randn(n), a, b, 0.5)


def linear(x: Tensor, backend: str) -> Tensor:
    return F.lora_linear(x, torch.randn(N, K), torch.randn(N), *factors(), 0.5, backend=backend)


def update(x: Tensor, backend: str) -> Tensor:
    return F.lora_update(x @ torch.randn(K, N), x, *factors(), 0.5, backend=backend)


def group(x: Tensor, backend: str) -> Tensor:
    (a, b), weights = factors(), [torch.randn(N, K)] * 2
    return F.lora_linear_group(x, weights, [torch.randn(N)] * 2, [a] * 2, [b] * 2, [0.5] * 2, backend=backend)[1]


def gated(x: Tensor, backend: str) -> Tensor:
    return F.lora_gated_mlp(x, projection(N, K), projection(N, K), projection(K, N), "silu", backend=backend)


def jobs(x: Tensor, backend: str) -> Tensor:
    (a, b), rows = factors(), [0] * (len(x) if x.dim() > 1 else 1)
    return F.jobs_linear(x, torch.randn(N, K), torch.randn(N), [a], [b], [0.5], rows, backend=backend)


def op(x: Tensor, backend: str) -> Tensor:
    return torch.ops.fastlora.lora_linear(x, torch.randn(N, K), None, *factors(), None, None, 0.5, 0.0, backend)[0]


SMALL, LARGE = [(3, K), (2, 3, K), (2, 1, 3, K)], [(2, 4100, K)]  # more than 2**17 elements are not few


@pytest.mark.parametrize(
    ("shape", "backend"), [*((shape, "triton") for shape in SMALL), *((shape, "torch") for shape in SMALL + LARGE)]
)
@pytest.mark.parametrize("layer", [linear, update, group, gated, jobs, op])
def test_an_output_changed_in_place(
    layer: Callable[[Tensor, str], Tensor], shape: tuple[int, ...], backend: str
) -> None:
    x, grads = torch.randn(shape, requires_grad=True), []
    for change in (lambda y: y.mul_(2)[..., 1:].relu_(), lambda y: (y * 2)[..., 1:].relu()):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(change(layer(x, backend)).sum(), x)[0])
    assert_same(*grads)


@pytest.mark.parametrize("jobs", [[-1, -1], [-1, 0]])
def test_an_update_is_a_tensor_of_its_own(jobs: list[int]) -> None:
    """Of the base's rows alone, too: what follows in place leaves the base's output as it was."""
    y, x = torch.randn(2, N), torch.randn(2, K)
    before, (a, b) = y.clone(), factors()
    with torch.no_grad():
        F.jobs_update(y, x, [a], [b], [0.5], jobs).zero_()
    assert_same(y, before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("rows", [4, 1100])
def test_relu_in_place_behind_a_patched_layer(rows: int, adapters: int, bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48, bias=bias), nn.ReLU(inplace=True), nn.Linear(48, 8, bias=bias))
    config = LoraConfig(r=R, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config)
    if adapters == 2:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    ours = copy.deepcopy(model)
    fastlora.patch(ours, strict=True)
    x = torch.randn(2, rows, 64)
    for each in (model, ours):
        each(x).square().mean().backward()
    for theirs, mine in zip(model.parameters(), ours.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
