"""The GEMM on tensor descriptors: against float64 and against the plain form, and who gets which of the two."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from launches import plan_by, watch
from operands import SCALE, Layer, a_seed, bf16, fp16, fp32, lay, layer
from test_kernels import dropout, hold
from tolerance import assert_same

import fastlora_kernels as kernels
from fastlora_kernels import Tile
from fastlora_kernels.launch import Layout, layout
from fastlora_kernels.persistent import takes_tma

pytestmark = pytest.mark.usefixtures("poison")

gemm = import_module("fastlora_kernels.expand")  # the package names its function so

CASES = [(mix, R) for mix in ("fp16", "bf16", "bf16+fp32") for R in (1, 7, 16, 33, 512)]
cases = pytest.mark.parametrize(("mix", "R"), CASES)
M, K, N = 45, 72, 56
"""No multiple of a tile, and rows of 16 bytes; in tiles of 32×32, four of y with N columns and six with K."""


def described(R: int) -> Tile:
    return Tile(32, 32, 64, BLOCK_R=128 if R > 128 else 32, tma=True)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms of the GEMM launched so far, in order."""
    launched: list[str] = []

    def see(kernel: str) -> None:
        if kernel in ("persistent", "expand"):
            launched.append("tma" if kernel == "persistent" else "plain")

    watch(monkeypatch, see)
    return launched


@cases
def test_expand(mix: str, R: int, forms: list[str], device: str) -> None:
    t = layer(mix, R, device, M, K, N)
    args = (t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias)
    y = kernels.expand(*args, config=described(R))
    hold(y, "expand", *args)
    plain = kernels.expand(*args, config=replace(described(R), tma=False))
    assert forms == ["tma", "plain"]
    if device == "cpu":
        assert_same(y, plain)


@dropout
@pytest.mark.parametrize("R", [7, 40])
@pytest.mark.parametrize("other", [dict(flatten=True), dict(programs=2), dict(flatten=True, programs=2)], ids=str)
def test_the_loops_as_one_and_two_programs_a_processor(other: Any, R: int, p: float, device: str) -> None:
    """The same bits: each tile sums in the same order, whoever walks to it; with 40 ranks the loop over them stays."""
    t, seed = layer("bf16+fp32", R, device, M, K, N), a_seed(device)
    for launch in (
        lambda config: kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias, config=config),
        lambda config: kernels.dx(t.dy, t.w, t.dh, t.a, p=p, seed=seed, config=config),
    ):
        assert_same(launch(replace(described(R), **other)), launch(described(R)))


@dropout
@cases
def test_dx(mix: str, R: int, p: float, forms: list[str], device: str) -> None:
    t, seed = layer(mix, R, device, M, K, N), a_seed(device)
    args = (t.dy, t.w, t.dh, t.a)
    grad = kernels.dx(*args, p=p, seed=seed, config=described(R))
    hold(grad, "dx", *args, p=p, seed=seed)
    plain = kernels.dx(*args, p=p, seed=seed, config=replace(described(R), tma=False))
    assert forms == ["tma", "plain"]
    if device == "cpu":
        assert_same(grad, plain)


def test_halves_of_256_columns(device: str) -> None:
    """A tile this wide draws its mask, and stores its result, one half after the other; here the second is ragged."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("128 columns a tile there: 256 take 520 columns of tensor memory, of 512")
    t, seed = layer("bf16+fp32", 7, device, 70, 200, 24), a_seed(device)
    wide = Tile(64, 256, 32, BLOCK_R=16, tma=True)
    grad = kernels.dx(t.dy, t.w, t.dh, t.a, p=0.3, seed=seed, config=wide)
    hold(grad, "dx", t.dy, t.w, t.dh, t.a, p=0.3, seed=seed)
    if device == "cpu":
        assert_same(grad, kernels.dx(t.dy, t.w, t.dh, t.a, p=0.3, seed=seed, config=replace(wide, tma=False)))


@pytest.mark.parametrize("programs", [1, 3, 12, 132])
def test_a_program_walks_over_several_tiles(programs: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Twelve tiles of y; more programs than tiles are not launched."""
    t = layer("bf16", 7, device, 90, 40, 120)
    monkeypatch.setattr(gemm, "place", lambda x: kernels.device.place(x)._replace(processors=programs))
    y = kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias, config=described(7))
    hold(y, "expand", t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias)


def test_more_rows_than_one_group(device: str) -> None:
    """Ten blocks of 16 rows: blocks of four share their columns of w, and the last group has two."""
    t = layer("fp16", 7, device, 147, 40, 56)
    y = kernels.expand(t.x, t.w, None, t.h, t.b, SCALE, config=Tile(16, 32, 64, GROUP_M=4, tma=True))
    hold(y, "expand", t.x, t.w, None, t.h, t.b, SCALE)


def test_no_rows(forms: list[str], device: str) -> None:
    t = layer("bf16", 7, device, 0, K, N)
    assert kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, config=described(7)).shape == (0, N)
    assert kernels.dx(t.dy, t.w, t.dh, t.a, config=described(7)).shape == (0, K)
    assert forms == []


def _off(t: torch.Tensor) -> torch.Tensor:
    """t's values, one element past an address of 16 bytes."""
    return t.new_empty(t.numel() + 8)[1 : 1 + t.numel()].view(t.shape).copy_(t)


def _narrowed(t: torch.Tensor) -> torch.Tensor:
    return lay(torch.nn.functional.pad(t, (0, 4)))[:, :-4]


PLAIN = {
    "x begins between": lambda t: replace(t, x=_off(t.x)),
    "w begins between": lambda t: replace(t, w=_off(t.w)),
    "rows of x are 8 bytes from aligned": lambda t: replace(t, x=_narrowed(t.x)),
    "rows of w are 8 bytes from aligned": lambda t: replace(t, w=_narrowed(t.w)),
    "x is transposed": lambda t: replace(t, x=t.x.t().contiguous().t()),
    "x repeats one row": lambda t: replace(t, x=t.x[:1].expand(M, K)),
    "x skips columns": lambda t: replace(t, x=t.x.repeat_interleave(2, 1)[:, ::2]),
    "rows of y are 8 bytes from aligned": lambda t: replace(t, w=t.w[:52], b=t.b[:52], bias=t.bias[:52]),
    "fp32": lambda t: t.map(torch.Tensor.float),
}


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_what_no_descriptor_can_address_runs_plain(change: Any, forms: list[str], device: str) -> None:
    t: Layer = change(layer("bf16", 7, device, M, K, N))
    y = kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, config=described(7))
    assert forms == ["plain"]
    hold(y, "expand", t.x, t.w, t.bias, t.h, t.b, SCALE)


def test_padded_rows_and_transposed_weights_are_described(forms: list[str], device: str) -> None:
    """NaN lies between the rows of x; a weight kept as [K, N] is loaded by its own rows, in expand as in dx."""
    t = layer("bf16", 7, device, M, K, N)
    x = lay(torch.nn.functional.pad(t.x, (0, 8), value=float("nan")))[:, :-8]
    w = t.w.t().contiguous().t()
    y = kernels.expand(x, w, None, t.h, t.b, SCALE, config=described(7))
    hold(y, "expand", x, w, None, t.h, t.b, SCALE)
    grad = kernels.dx(t.dy, w, t.dh, t.a, config=described(7))
    hold(grad, "dx", t.dy, w, t.dh, t.a)
    assert forms == ["tma", "tma"]


def test_a_coordinate_is_an_int32() -> None:
    def of(*shape: int, dtype: torch.dtype = bf16) -> Layout:
        return layout(torch.empty(shape, dtype=dtype, device="meta"))

    w = of(64, 64)
    assert takes_tma([of(2**31 - 8, 64)], [w], of(2**31 - 8, 64))
    assert not takes_tma([of(2**31, 64)], [w], of(2**31, 64))
    assert not takes_tma([of(64, 0)], [of(64, 0)], of(64, 64))
    assert not takes_tma([of(64, 64)], [of(64, 64, dtype=fp16)], of(64, 64))
    assert not takes_tma([of(64, 64, dtype=fp32)], [of(64, 64, dtype=fp32)], of(64, 64, dtype=fp32))


def test_the_table_names_another_tile_for_what_runs_plain(
    forms: list[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    asked: list[bool] = []

    def tile(kernel: str, arch: str, dtype: Any, M: int, N: int, R: int, tma: bool = True, masks: int = 0) -> Tile:
        asked.append(tma)
        return replace(described(7), tma=tma)

    plan_by(monkeypatch, "expand", tile=tile)
    t = layer("bf16", 7, device, M, K, N)
    kernels.expand(t.x, t.w, None, t.h, t.b, SCALE)
    assert (asked, forms) == ([True], ["tma"])
    kernels.expand(_off(t.x), t.w, None, t.h, t.b, SCALE)
    assert (asked, forms) == ([True, True, False], ["tma", "plain"])
