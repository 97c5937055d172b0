"""Each kernel over layers that share one input: against the twins of the layers one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from grouped import ODD_NS, YARDS, Group, M, cases, dropout, each, group, hold
from operands import bf16, double, fp32, small_tile
from tolerance import assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile
from fastlora_kernels.members import columns

pytestmark = pytest.mark.usefixtures("poison")


@cases
def test_shrink(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    g = group(mix, Rs, device, ps)
    h = kernels.group_shrink(g.x, g.of("a"), **g.drop, config=small_tile(max(Rs)))
    assert h.shape == (M, sum(Rs)) and h.dtype == fp32 and h.is_contiguous()
    results = [
        each(t, module.shrink, "x", "a") for module, t in ((plain, g), (reference, g), (reference, g.map(double)))
    ]
    for i, (part, *wanted) in enumerate(zip(columns(h, g.of("a")), *results, strict=True)):
        assert part is not None
        hold(part, *wanted, f"h of member {i}")


@cases
def test_dy_pass(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    g = group(mix, Rs, device, ps, Ns=ODD_NS)
    everyone = [True] * len(g)
    hs = columns(torch.cat(g.of("h"), 1), g.of("a"))
    dh, dbs = kernels.group_dy_pass(
        g.of("dy"), hs, g.of("b"), g.scales, want_dh=everyone, want_db=everyone, config=small_tile(max(Rs))
    )
    for i, (t, scale, part, db) in enumerate(zip(g.members, g.scales, columns(dh, g.of("a")), dbs, strict=True)):
        args = (t.dy, t.h, t.b, scale)
        results = [module.dy_pass(*map(wide, args)) for module, wide in YARDS]
        for name, ours, *wanted in zip(("dh", "db"), (part, db), *results, strict=True):
            hold(ours, *wanted, f"{name} of member {i}")


@cases
def test_x_pass(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    g = group(mix, Rs, device, ps)
    dhs = columns(torch.cat(g.of("dh"), 1), g.of("a"))
    dtypes = [a.dtype for a in g.of("a")]
    das = kernels.group_x_pass(g.x, dhs, dtypes, **g.drop, config=small_tile(max(Rs)))

    def results(module: Any, wide: Callable[[Any], Any]) -> list[Tensor]:
        t, given = g.map(wide), iter(map(wide, dtypes))
        return each(t, lambda x, dh, **drop: module.x_pass(x, dh, next(given), **drop), "x", "dh")

    for i, (da, *wanted) in enumerate(zip(das, *(results(*yard) for yard in YARDS), strict=True)):
        hold(da, *wanted, f"da of member {i}")


def dx_yards(g: Group, base: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """dx of the group: as PEFT sums the members' (rounded each), as their twin does (rounded once), and in float64."""

    def total(module: Any, t: Group) -> Tensor:
        dxs = [
            module.dx(u.dy if base else t.x, u.w if base else None, u.dh, u.a, p=p, seed=seed)
            for u, p, seed in zip(t.members, t.ps, t.seeds, strict=True)
        ]
        return sum(dxs[1:], dxs[0])

    wide = g.map(lambda v: v.float())
    return total(plain, g), total(reference, wide).to(g.x.dtype), total(reference, g.map(double))


@cases
def test_dx(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    """Both forms where descriptors can address the operands; at equal blocks they agree bit for bit, interpreted."""
    g = group(mix, Rs, device, ps)
    dhs = columns(torch.cat(g.of("dh"), 1), g.of("a"))
    args = (g.of("dy"), g.of("w"), dhs, g.of("a"))
    config = Tile(32, 32, 64, BLOCK_R=128 if max(Rs) > 128 else 32)
    grad = kernels.group_dx(*args, **g.drop, config=config)
    hold(grad, *dx_yards(g), "dx")
    if g.x.dtype != fp32 and device == "cpu":
        assert_same(kernels.group_dx(*args, **g.drop, config=replace(config, tma=True)), grad)


@dropout
def test_halves_of_256_columns(ps: tuple[float, ...], device: str) -> None:
    """A tile of 256 columns sums its terms one half after the other; the second is ragged here."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("128 columns a tile there")
    g = group("bf16+fp32", (7, 16, 33), device, ps, (70, 200))
    args, wide = (g.of("dy"), g.of("w"), g.of("dh"), g.of("a")), Tile(64, 256, 32, BLOCK_R=16, tma=True)
    grad = kernels.group_dx(*args, **g.drop, config=wide)
    hold(grad, *dx_yards(g), "dx")
    if device == "cpu":
        assert_same(grad, kernels.group_dx(*args, **g.drop, config=replace(wide, tma=False)))


@cases
def test_low_rank_dx(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    g = group(mix, Rs, device, ps)
    grad = kernels.group_low_rank_dx(g.of("dh"), g.of("a"), g.x.dtype, **g.drop, config=small_tile(max(Rs)))
    hold(grad, *dx_yards(g, base=False), "dx without w")


def test_masks_are_the_references_bit_for_bit(device: str) -> None:
    """Read off each pass: with ones for x and units for the factors, what comes out are the masks, scaled."""
    size, ps = 48, (0.3, 0.5, 0.0)
    seeds, ones = torch.tensor([5, -6, 7], device=device), torch.ones(size, size, device=device)
    units = [torch.eye(size, device=device)] * 3
    masks = [reference._drop(ones, p, seed) for p, seed in zip(ps, seeds, strict=True)]
    config = Tile(16, 32, 32)
    h = kernels.group_shrink(ones, units, ps=ps, seeds=seeds, config=config)
    assert_same(h, torch.cat(masks, 1))
    for da, mask in zip(kernels.group_x_pass(ones, units, [fp32] * 3, ps=ps, seeds=seeds), masks, strict=True):
        assert_same(da, mask)
    column, rows = [ones[:, :1]] * 3, [1024.0**i * ones[:1] for i in range(3)]
    total = masks[0] + 1024 * masks[1] + 1024**2 * masks[2]
    assert_same(kernels.group_low_rank_dx(column, rows, fp32, ps=ps, seeds=seeds, config=config), total)
    zero = ones.to(bf16) * 0
    grad = kernels.group_dx(
        [zero], [zero], column[:1], rows[:1], ps=ps[:1], seeds=seeds, config=replace(config, tma=True)
    )
    assert_same(grad, masks[0].to(bf16))
