"""Each launcher against float64: every dtype mix × rank, odd sizes over several tiles, with dropout and without.

A result may err no more than PEFT's formulation, and no more than its own twin, summed in fp32 and rounded once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import fastlora_kernels as kernels
import plain
import pytest
import torch
from fastlora_kernels import Tile
from operands import MAIN_MIXES, MIXES, ODD_MIXES, bf16, fp16, fp32, normal
from tolerance import assert_close, assert_same, relative_error
from torch import Tensor

from fastlora import reference

pytestmark = pytest.mark.usefixtures("poison")

SCALE = 1.7
CASES = [(mix, R) for mix in MAIN_MIXES for R in (1, 7, 16, 33, 512)] + [(mix, R) for mix in ODD_MIXES for R in (7, 33)]
cases = pytest.mark.parametrize(("mix", "R"), CASES)
dropout = pytest.mark.parametrize("p", [0.0, 0.3])


def config(R: int) -> Tile:
    """Small tiles, several on each axis of a problem; the rank is walked in several steps from 33 on."""
    return Tile(32, 32, 32, BLOCK_R=128 if R > 128 else 32)


def problem(mix: str, R: int, device: str, M: int = 45, K: int = 70, N: int = 51) -> SimpleNamespace:
    """Operands of one layer, all of unit size, so that neither branch hides the other's error."""
    main, a, b = MIXES[mix]
    shapes = {
        "x": ((M, K), main, 1.0),
        "w": ((N, K), main, K**-0.5),
        "bias": ((N,), main, 1.0),
        "a": ((R, K), a, K**-0.5),
        "b": ((N, R), b, R**-0.5),
        "lora_bias": ((N,), b, 1.0),
        "h": ((M, R), fp32, 1.0),
        "dh": ((M, R), fp32, R**-0.5),
        "dy": ((M, N), main, 1.0),
        "base": ((M, K), main, 1.0),
    }
    tensors = {n: normal(*shape, dtype=dtype, device=device, std=std) for n, (shape, dtype, std) in shapes.items()}
    return SimpleNamespace(**tensors, seed=torch.tensor(-(2**62) - 12345, device=device))


def double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def hold(actual: Any, op: str, *args: Any, **kwargs: Any) -> None:
    """`actual` is what `op` gives, by the policy: against PEFT's formulation, and against the twin in fp32."""
    yardsticks = [getattr(module, op)(*args, **kwargs) for module in (plain, reference)]
    twin = yardsticks[1]
    exact = getattr(reference, op)(*map(double, args), **{name: double(value) for name, value in kwargs.items()})
    for yardstick in yardsticks:
        assert actual.dtype == twin.dtype, f"{op}: dtype {actual.dtype}, wanted {twin.dtype}"
        assert_close(actual, yardstick, exact, op)


@dropout
@cases
def test_shrink(mix: str, R: int, p: float, device: str) -> None:
    t = problem(mix, R, device)
    h = kernels.shrink(t.x, t.a, p=p, seed=t.seed, config=config(R))
    hold(h, "shrink", t.x, t.a, p=p, seed=t.seed)


@cases
def test_expand(mix: str, R: int, device: str) -> None:
    t = problem(mix, R, device)
    y = kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias, config=config(R))
    hold(y, "expand", t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias)
