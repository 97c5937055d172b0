"""Each launcher against float64: every dtype mix × rank, odd sizes over several tiles, with dropout and without.

A result may err no more than PEFT's formulation, and no more than its own twin, summed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import plain
import pytest
import torch
from operands import (
    MAIN_MIXES,
    ODD_MIXES,
    SCALE,
    a_seed,
    bf16,
    double,
    exact,
    fp16,
    fp32,
    launch,
    layer,
    small_tile,
    twins,
)
from tolerance import assert_close, assert_same, relative_error

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile

pytestmark = pytest.mark.usefixtures("poison")

CASES = [(mix, R) for mix in MAIN_MIXES for R in (1, 7, 16, 33, 512)] + [(mix, R) for mix in ODD_MIXES for R in (7, 33)]
cases = pytest.mark.parametrize(("mix", "R"), CASES)
dropout = pytest.mark.parametrize("p", [0.0, 0.3])


def hold(actual: Any, op: str, *args: Any, **kwargs: Any) -> None:
    """`actual` is what `op` gives, by the policy: against PEFT's formulation, and against the twin."""
    hold_all([actual], op, [args], **kwargs)


def hold_all(actual: list[Any], op: str, args: list[tuple[Any, ...]], **kwargs: Any) -> None:
    """The results of several calls, held as one tensor."""
    peft, twin = (torch.cat([getattr(module, op)(*one, **kwargs) for one in args]) for module in (plain, reference))
    wide = {name: double(value) for name, value in kwargs.items()}
    wanted = torch.cat([getattr(reference, op)(*map(double, one), **wide) for one in args])
    result = torch.cat(actual)
    assert result.dtype == twin.dtype, f"{op}: dtype {result.dtype}, wanted {twin.dtype}"
    assert_close(result, peft, wanted, op)
    assert_close(result, twin, wanted, f"{op} beside its twin")


@dropout
@cases
def test_shrink(mix: str, R: int, p: float, device: str) -> None:
    """Of rank 1 h has 45 numbers, too few for a mean square (one draw in eight errs too much): 16 layers as one.

    In steps of 32 features: the tables' 64 take 1.15 of what is allowed beside the twin (docs/gpu.md).
    """
    layers, seed = [layer(mix, R, device) for _ in range(16 if R == 1 else 1)], a_seed(device)
    hs = [kernels.shrink(t.x, t.a, p=p, seed=seed, config=small_tile(R)) for t in layers]
    hold_all(hs, "shrink", [(t.x, t.a) for t in layers], p=p, seed=seed)


@cases
def test_expand(mix: str, R: int, device: str) -> None:
    t = layer(mix, R, device)
    y = kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias, config=small_tile(R))
    hold(y, "expand", t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias)


@cases
def test_add_expand(mix: str, R: int, device: str) -> None:
    t = layer(mix, R, device)
    y = kernels.add_expand(t.dy, t.h, t.b, SCALE, t.lora_bias, config=small_tile(R))
    hold(y, "add_expand", t.dy, t.h, t.b, SCALE, t.lora_bias)
    place = t.dy.clone()
    assert kernels.add_expand(place, t.h, t.b, SCALE, t.lora_bias, out=place, config=small_tile(R)) is place
    assert_same(place, y)


@cases
def test_low_rank(mix: str, R: int, device: str) -> None:
    """An update of nothing."""
    t = layer(mix, R, device)
    y = kernels.low_rank(t.h, t.b, SCALE, t.dy.dtype, t.lora_bias, config=small_tile(R))
    hold(y, "add_expand", torch.zeros_like(t.dy), t.h, t.b, SCALE, t.lora_bias)


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16])
@pytest.mark.parametrize("mix", MAIN_MIXES)
def test_add_expand_into_another_dtype(mix: str, dtype: torch.dtype, device: str) -> None:
    t = layer(mix, 7, device)
    out = t.dy.new_empty(t.dy.shape, dtype=dtype)
    assert kernels.add_expand(t.dy, t.h, t.b, SCALE, t.lora_bias, out=out, config=small_tile(7)) is out
    hold(out, "add_expand", t.dy, t.h, t.b, SCALE, t.lora_bias, dtype=dtype)


@cases
def test_dy_pass(mix: str, R: int, device: str) -> None:
    t = layer(mix, R, device)
    both = kernels.dy_pass(t.dy, t.h, t.b, SCALE, config=small_tile(R))
    wanted = reference.dy_pass(*map(double, (t.dy, t.h, t.b, SCALE)))
    assert both[0] is not None and both[1] is not None
    assert both[0].dtype == fp32 and both[1].dtype == t.b.dtype
    for module in (plain, reference):
        for name, *results in zip(("dh", "db"), both, module.dy_pass(t.dy, t.h, t.b, SCALE), wanted, strict=True):
            assert_close(*results, f"{name} beside {module.__name__}")


@dropout
@cases
def test_x_pass(mix: str, R: int, p: float, device: str) -> None:
    t, seed = layer(mix, R, device), a_seed(device)
    da = kernels.x_pass(t.x, t.dh, t.a.dtype, p=p, seed=seed, config=small_tile(R))
    hold(da, "x_pass", t.x, t.dh, t.a.dtype, p=p, seed=seed)


@dropout
@cases
def test_dx(mix: str, R: int, p: float, device: str) -> None:
    t, seed = layer(mix, R, device), a_seed(device)
    grad = kernels.dx(t.dy, t.w, t.dh, t.a, p=p, seed=seed, config=small_tile(R))
    hold(grad, "dx", t.dy, t.w, t.dh, t.a, p=p, seed=seed)


@dropout
@cases
def test_low_rank_dx(mix: str, R: int, p: float, device: str) -> None:
    t, seed = layer(mix, R, device), a_seed(device)
    grad = kernels.low_rank_dx(t.dh, t.a, t.x.dtype, p=p, seed=seed, config=small_tile(R))
    hold(grad, "dx", t.x, None, t.dh, t.a, p=p, seed=seed)


@pytest.mark.parametrize(
    "config", [Tile(16, 64, 32, GROUP_M=4), Tile(64, 16, 128, BLOCK_R=16), Tile(128, 32, 16, BLOCK_R=64)]
)
def test_any_tile(config: Tile, device: str) -> None:
    """M makes ten blocks of 16 rows: two groups of four that share their columns, and one of two."""
    t = layer("bf16+fp32", 20, device, M=147)
    peft, wanted = twins(plain, t), exact(t)
    for name, value in launch(t, config).items():
        assert_close(value, peft[name], wanted[name], f"{name} at {config}")


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mix", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize(("precision", "bits"), [("highest", 22), ("high", 16), ("medium", 8)], indirect=["precision"])
def test_float32_matmul_precision_sets_the_bits(precision: str, bits: int, mix: str, device: str) -> None:
    """One bf16 piece of a factor carries 8 bits, two carry 16, three all 24 of fp32.

    A rounding to n bits errs by at most 2^−n: with two rounded factors a product errs by about 0.6·2^−n rms (measured:
    0.62 under "medium"; under "high" 0.30, for a second piece rounds a remainder that is below its bound already).
    Under "highest" fp32's accumulation is what is left, 0.3·2^−22. Much less error would mean the setting is ignored.
    """
    t = layer(mix, 33, device)
    wanted = exact(t)
    for name, value in launch(t, small_tile(33)).items():
        if value.dtype == fp32:
            error = relative_error(value, wanted[name])
            assert 2.0 ** -(bits + 4) <= error <= 2.0**-bits, f"{name}: error {error:.2e} under {precision!r}"
