"""Where kernels break: strides, empty and single rows, split sums, huge offsets; and what must not change a bit."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

import plain
import pytest
import torch
from launches import plan_by
from operands import LAYOUTS, SCALE, Layer, exact, launch, launch_thin, layer, small_tile, twins
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora_kernels import Tile

pytestmark = pytest.mark.usefixtures("poison")

TILE = small_tile(33)


def assert_launches_agree(left: Layer, right: Layer, config: Tile = TILE, p: float = 0.3) -> None:
    results = launch(right, config, p)
    for name, value in launch(left, config, p).items():
        assert_same(value, results[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", ["fp16", "bf16+fp32"])
def test_strides_change_no_bit(mix: str, layout: str, device: str) -> None:
    t = layer(mix, 20, device)
    strided = t.map(LAYOUTS[layout])
    assert not strided.x.is_contiguous() and not strided.w.is_contiguous()
    assert_launches_agree(strided, t)


def test_stride_zero(device: str) -> None:
    """What .sum() sends back, one value for all; and one row, or one column, for all."""
    t = layer("bf16+fp32", 7, device)
    for dy, x in ((t.dy[:1, :1], t.x[:1]), (t.dy[:, :1], t.x[:, :1])):
        spread = replace(t, dy=dy.expand(t.dy.shape), x=x.expand(t.x.shape))
        assert 0 in spread.dy.stride() and 0 in spread.x.stride()
        assert_launches_agree(spread, replace(t, dy=spread.dy.contiguous(), x=spread.x.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_into_strides(layout: str, device: str) -> None:
    """In place on a strided base, with whatever lies between its elements left alone."""
    t = layer("bf16+fp32", 7, device)
    out = LAYOUTS[layout](t.dy)
    ground = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    between = int(ground.isnan().sum())
    kernels.add_expand(out, t.h, t.b, SCALE, t.lora_bias, out=out, config=TILE)
    assert_same(out, kernels.add_expand(t.dy, t.h, t.b, SCALE, t.lora_bias, config=TILE))
    assert int(ground.isnan().sum()) == between > 0


@pytest.mark.parametrize("mix", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("M", "K", "N", "R"),
    [(0, 70, 51, 7), (45, 0, 51, 7), (45, 70, 0, 7), (1, 70, 51, 7), (45, 1, 51, 7), (45, 70, 1, 7)],
)
def test_empty_and_single(M: int, K: int, N: int, R: int, mix: str, device: str) -> None:
    """No rows give empty h, y and dx, and zeros for da and db; no features, no product."""
    t = layer(mix, R, device, M, K, N)
    peft, wanted = twins(plain, t, 0.3 if M else 0.0), exact(t, 0.3 if M else 0.0)
    for name, value in launch(t, TILE, 0.3).items():
        assert_close(value, peft[name], wanted[name], name)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many partials each reduction of this test summed, in order."""
    counts: list[int] = []

    def counted(partials: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        counts.extend(map(len, partials))
        reduce_each(partials, outs)

    module = importlib.import_module("fastlora_kernels.reduce")
    reduce_each = module.reduce_each
    for name in ("reduce", "dy_pass", "x_pass"):
        monkeypatch.setattr(importlib.import_module(f"fastlora_kernels.{name}"), "reduce_each", counted)
    return counts


def split_sums(t: Layer, config: Tile) -> None:
    """By the policy, and bit for bit the same when run again."""
    peft, wanted, again = twins(plain, t, 0.3), exact(t, 0.3), launch_thin(t, config, 0.3)
    for name, value in launch_thin(t, config, 0.3).items():
        assert_same(value, again[name])
        assert_close(value, peft[name], wanted[name], name)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((9, 1100, 40), [2]), ((9, 40, 1100), [2]), ((2060, 20, 30), [2, 2])],
    ids=["few rows, many features: h in parts", "the same of dy: dh in parts", "many rows: db and da in bands"],
)
def test_split_sums(sizes: tuple[int, int, int], expected: list[int], parts: list[int], device: str) -> None:
    split_sums(layer("bf16+fp32", 5, device, *sizes), Tile(128, 128, 128))
    assert parts == expected * 2


def test_parts_and_bands_at_once(parts: list[int], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Three bands of rows, the last one short, and four parts of columns, where both would take large operands."""
    cut = {"chunks": lambda *_, **__: (4, 32), "bands": lambda *_: (3, 32)}
    plan_by(monkeypatch, "shrink", "dy_pass", "x_pass", **cut)
    split_sums(layer("bf16+fp32", 20, device, M=75, K=100, N=105), TILE)
    assert sorted(parts) == sorted([4, 4, 3, 3] * 2)  # h and dh; da and db


def test_dy_pass_computes_what_is_wanted(device: str) -> None:
    t = layer("bf16+fp32", 7, device)
    dh, db = kernels.dy_pass(t.dy, t.h, t.b, SCALE, config=TILE)
    assert dh is not None and db is not None
    only_dh = kernels.dy_pass(t.dy, None, t.b, SCALE, want_db=False, config=TILE)
    only_db = kernels.dy_pass(t.dy, t.h, t.b, SCALE, want_dh=False, config=TILE)
    assert only_dh[1] is None and only_db[0] is None
    assert_same(only_dh[0], dh)
    assert_same(only_db[1], db)


@pytest.mark.parametrize("mix", ["fp32", "bf16+fp32"])
def test_linear_in_scale(mix: str, device: str) -> None:
    """Twice the scale is twice the result, bit for bit, and scale 0 is the base alone."""
    t = layer(mix, 33, device)
    nothing = torch.zeros_like(t.dy)
    update = kernels.add_expand(nothing, t.h, t.b, SCALE, t.lora_bias, config=TILE)
    assert_same(kernels.add_expand(nothing, t.h, t.b, -2 * SCALE, t.lora_bias, config=TILE), -2 * update)
    once, twice = (kernels.dy_pass(t.dy, t.h, t.b, scale, config=TILE) for scale in (SCALE, -2 * SCALE))
    for left, right in zip(once, twice, strict=True):
        assert left is not None
        assert_same(right, -2 * left)
    base = kernels.expand(t.x, t.w, t.bias, torch.zeros_like(t.h), t.b, SCALE, config=TILE)
    assert_same(kernels.expand(t.x, t.w, t.bias, t.h, t.b, 0.0, t.lora_bias, config=TILE), base)


@pytest.mark.parametrize(("R", "padded"), [(7, 13), (33, 50)])
def test_ranks_of_zeros_change_no_bit(R: int, padded: int, device: str) -> None:
    t = layer("bf16+fp32", R, device)

    def pad(u: Tensor, axis: int) -> Tensor:
        shape = list(u.shape)
        shape[axis] = padded - R
        return torch.cat((u, u.new_zeros(shape)), axis)

    wide = launch(replace(t, a=pad(t.a, 0), b=pad(t.b, 1), h=pad(t.h, 1), dh=pad(t.dh, 1)), TILE, 0.3)
    for name, value in launch(t, TILE, 0.3).items():
        kept = {"shrink": wide["shrink"][:, :R], "dh": wide["dh"][:, :R], "db": wide["db"][:, :R], "da": wide["da"][:R]}
        assert_same(kept.get(name, wide[name]), value)


def test_rows_know_nothing_of_each_other(device: str) -> None:
    """Permuted rows give permuted rows, bit for bit; interpreted, where numpy's products depend on a row's place among
    those of its tile, whole tiles are permuted."""
    t = layer("bf16+fp32", 20, device, M=4 * TILE.BLOCK_M)
    rows = torch.arange(len(t.x), device=device)
    order = rows.view(4, -1)[[2, 0, 3, 1]].view(-1) if device == "cpu" else rows[torch.randperm(len(rows))]
    shuffled = launch(replace(t, x=t.x[order], dy=t.dy[order], h=t.h[order], dh=t.dh[order]), TILE)
    for name, value in launch(t, TILE).items():
        if name not in ("da", "db"):
            assert_same(shuffled[name], value[order])


def far(t: Tensor) -> Tensor:
    """t with 2²⁶ + 8 elements from row to row: an address space of which only the pages written take memory."""
    return torch.empty(len(t), 2**26 + 8, dtype=t.dtype, device=t.device)[:, : t.shape[1]].copy_(t)


def test_offsets_beyond_int32(device: str) -> None:
    """Operands that span over 2³¹ elements, row by row and column by column; h and dh are our own, and small."""
    t, tile = layer("bf16", 40, device, M=40, K=40, N=40), Tile(64, 64, 64)  # within one tile, too
    names = ("x", "w", "dy", "a", "b")
    assert_launches_agree(replace(t, **{name: far(getattr(t, name)) for name in names}), t, tile, p=0)
    assert_launches_agree(replace(t, **{name: far(getattr(t, name).t()).t() for name in names}), t, tile, p=0)
    for out in (far(t.dy), far(t.dy.t()).t()):
        assert 39 * max(out.stride()) > 2**31
        kernels.add_expand(out, t.h, t.b, SCALE, out=out, config=tile)
        assert_same(out, kernels.add_expand(t.dy, t.h, t.b, SCALE, config=tile))
