"""Forward and backward of layers that share one input: what is launched, how often, and what it comes to."""

from __future__ import annotations

import plain
import pytest
import torch
from grouped import (
    NS,
    ODD_NS,
    PS,
    SCALES,
    YARDS,
    K,
    M,
    assert_all_same,
    backward,
    cases,
    each,
    exact_backward,
    forward,
    group,
    hold,
)
from launches import plan_by, watch
from operands import LAYOUTS, double
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels.members import columns

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("how", ["fused", "split"])
@cases
def test_group_linear(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], how: str, device: str) -> None:
    g = group(mix, Rs, device, ps, sizes=(M, 71), Ns=ODD_NS)
    ys, h = forward(g, how)
    hs, lows = columns(h, g.of("a")), []
    for i, (t, y, scale, p, seed) in enumerate(zip(g.members, ys, g.scales, g.ps, g.seeds, strict=True)):
        results = []
        for module, wide in YARDS:
            u = t.map(wide)
            low = module.shrink(u.x, u.a, p=p, seed=seed)
            results.append((module.expand(u.x, u.w, u.bias, low, u.b, scale, u.lora_bias), low))
        peft, twin, exact = results
        assert y.dtype == t.x.dtype and y.shape == (M, ODD_NS[i])
        assert_close(y, peft[0], exact[0], f"y of member {i}")
        lows.append((hs[i], peft[1], twin[1], exact[1]))
    hold(*(torch.cat(parts, 1) for parts in zip(*lows, strict=True)), "h")


@pytest.mark.parametrize("how", ["fused", "split"])
@cases
def test_group_backward(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], how: str, device: str) -> None:
    g = group(mix, Rs, device, ps, sizes=(M, 71), Ns=ODD_NS)
    grad, das, dbs = backward(g, how)
    peft, exact = exact_backward(g, lambda v: v, plain), exact_backward(g, double, reference)
    assert_close(grad, sum(peft[0][1:], peft[0][0]), sum(exact[0][1:], exact[0][0]), "dx")
    for i, t in enumerate(g.members):
        assert das[i].dtype == t.a.dtype and dbs[i].dtype == t.b.dtype
        assert_close(das[i], peft[1][i], exact[1][i], f"da of member {i}")
        assert_close(dbs[i], peft[2][i], exact[2][i], f"db of member {i}")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums cut as large operands' are: three parts of the columns, and bands of 64 rows or of the tile's 128."""

    def chunks(long: int, programs: int, block: int, least: int) -> tuple[int, int]:
        return 3, -(-long // (3 * block)) * block

    def bands(M: int, R: int, block: int, most: int) -> tuple[int, int]:
        rows = max(64, block)
        return -(-M // rows), rows

    plan_by(monkeypatch, "shrink", "dy_pass", "x_pass", chunks=chunks, bands=bands)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("how", ["fused", "split"])
def test_split_sums_have_the_same_bits_in_two_runs(how: str, launched: list[str], device: str) -> None:
    """Two bands, the last one short; a member with fewer columns than parts."""
    g = group("bf16+fp32", (5, 1, 33), device, sizes=(150, 130), Ns=(140, 70, 3))
    ys, h = forward(g, how)
    grad, das, dbs = backward(g, how)
    assert launched == ["shrink", "reduce", *["expand"] * 3, "dy", "reduce", "reduce", "x", "reduce", "expand"]
    assert_all_same((ys, h), forward(g, how))
    assert_all_same((grad, das, dbs), backward(g, how))
    peft, exact = exact_backward(g, lambda v: v, plain), exact_backward(g, double, reference)
    assert_close(grad, sum(peft[0][1:], peft[0][0]), sum(exact[0][1:], exact[0][0]), "dx")
    lows = [each(t, module.shrink, "x", "a") for module, t in ((plain, g), (reference, g), (reference, g.map(double)))]
    for i, part in enumerate(columns(h, g.of("a"))):
        hold(part, *(low[i] for low in lows), "h")
        assert_close(das[i], peft[1][i], exact[1][i], "da")
        assert_close(dbs[i], peft[2][i], exact[2][i], "db")


@pytest.mark.parametrize("how", ["fused", "split"])
def test_a_group_of_one_is_the_layer(how: str, device: str) -> None:
    g = group("bf16+fp32", (20,), device)
    t, (p,), seed = g.members[0], g.ps, g.seeds[0]
    y, h = kernels.lora_linear(g.x, t.w, t.bias, t.a, t.b, t.lora_bias, seed, SCALES[0], p, how)
    assert_all_same(forward(g, how), ([y], h))
    grads = kernels.lora_backward(t.dy, g.x, t.w, t.a, t.b, t.h, seed, SCALES[0], p, True, True, True, how)
    assert_all_same(backward(g, how), (grads[0], [grads[1]], [grads[2]]))


def test_members_have_the_bits_that_they_have_alone(device: str) -> None:
    """Where no sum is split, h, dh, db and da of a member know nothing of the others."""
    g = group("bf16+fp32", (16, 33, 7), device)
    ys, h = forward(g, "fused")
    _, das, dbs = backward(g)
    for i, t in enumerate(g.members):
        one = (t.a, t.b, t.lora_bias, g.seeds[i], SCALES[i], g.ps[i])
        y, low = kernels.lora_linear(g.x, t.w, t.bias, *one, "fused")
        assert_all_same((ys[i], columns(h, g.of("a"))[i]), (y, low))
        _, da, db = kernels.lora_backward(
            t.dy, g.x, t.w, t.a, t.b, t.h, g.seeds[i], SCALES[i], g.ps[i], False, True, True, "fused"
        )
        assert_all_same((das[i], dbs[i]), (da, db))


@pytest.mark.parametrize("how", ["fused", "split"])
def test_an_output_that_nobody_used(how: str, device: str) -> None:
    """Its dy is None: it adds nothing to dx, and its own gradients are zeros."""
    g = group("bf16+fp32", (7, 16, 3), device)
    dys = [g.of("dy")[0], None, g.of("dy")[2]]
    grad, das, dbs = backward(g, how, dy=dys)
    full = backward(g, how, dy=[dys[0], torch.zeros_like(g.of("dy")[1]), dys[2]])
    assert_all_same((das, dbs), full[1:])
    assert not das[1].any() and not dbs[1].any()
    if how == "split":
        assert_same(grad, full[0])
    exact = exact_backward(g, double, reference)[0]
    peft = exact_backward(g, lambda v: v, plain)[0]
    assert_close(grad, peft[0] + peft[2], exact[0] + exact[2], "dx")
    grad, das, dbs = backward(g, how, dy=[None] * 3)
    assert grad is None and not any(t.any() for t in (*das, *dbs))


@pytest.mark.parametrize("how", ["fused", "split"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_member_without_an_adapter(at: int, how: str, device: str) -> None:
    """It is the frozen layer; the others keep their own columns, masks and bits."""
    g = group("bf16+fp32", (7, 16, 3), device)

    def without(name: str) -> list[Tensor | None]:
        return [None if i == at else t for i, t in enumerate(g.of(name))]

    bare = {name: without(name) for name in ("a", "b", "lora_bias")}
    ys, h = forward(g, how, **bare)
    whole, low = forward(g, how)
    assert_same(ys[at], torch.nn.functional.linear(g.x, g.of("w")[at], g.of("bias")[at]))
    others = [i for i in range(3) if i != at]
    assert_all_same([ys[i] for i in others], [whole[i] for i in others])
    assert_same(h, torch.cat([columns(low, g.of("a"))[i] for i in others], 1))
    hs = torch.cat([g.of("h")[i] for i in others], 1)
    grad, das, dbs = backward(g, how, a=bare["a"], b=bare["b"], h=hs)
    assert das[at] is None and dbs[at] is None
    full = backward(g, how)
    assert_all_same([das[i] for i in others], [full[1][i] for i in others])
    peft, exact = exact_backward(g, lambda v: v, plain)[0], exact_backward(g, double, reference)[0]
    t = g.members[at]
    frozen, true = t.dy @ t.w, t.dy.double() @ t.w.double()
    assert_close(grad, frozen + peft[others[0]] + peft[others[1]], true + exact[others[0]] + exact[others[1]], "dx")


def test_a_group_of_frozen_layers(device: str) -> None:
    g, nobody = group("bf16", (7, 7), device), [None, None]
    ys, h = forward(g, a=nobody, b=nobody, lora_bias=nobody)
    assert h.shape == (M, 0) and len(ys) == 2
    grad, das, dbs = backward(g, "fused", a=nobody, b=nobody, h=None)
    assert das == dbs == nobody
    assert_same(grad, torch.addmm(g.of("dy")[0] @ g.of("w")[0], g.of("dy")[1], g.of("w")[1]))


def test_only_what_is_wanted(device: str) -> None:
    """The bits are those of the whole; operands that nothing wanted needs may be missing."""
    g = group("bf16+fp32", (7, 16, 3), device)
    whole = backward(g)
    no, some = [False] * 3, [False, True, False]
    assert_all_same(backward(g, want=(True, no, no), x=None, h=None), (whole[0], [None] * 3, [None] * 3))
    grad, das, dbs = backward(g, want=(False, some, no), w=[None] * 3, h=None)
    assert grad is None and dbs == [None] * 3 and das[0] is das[2] is None
    assert_same(das[1], whole[1][1])
    grad, das, dbs = backward(g, want=(False, no, some), w=[None] * 3, x=None)
    assert grad is None and das == [None] * 3 and dbs[0] is dbs[2] is None
    assert_same(dbs[1], whole[2][1])
    assert backward(g, want=(False, no, no), x=None, h=None, w=[None] * 3) == (None, [None] * 3, [None] * 3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far, in order."""
    names: list[str] = []
    watch(monkeypatch, names.append)
    return names


def test_one_launch_a_pass(launched: list[str], device: str) -> None:
    """x is read once for every h and once for every da, each dy once for dh and db, and dx is written once."""
    g = group("bf16+fp32", (16, 7, 33), device, sizes=(70, 72))
    forward(g, "fused")
    assert launched == ["shrink", "expand", "expand", "expand"]
    launched.clear()
    backward(g, "fused")
    assert launched == ["dy", "x", "expand"]
    launched.clear()
    backward(g, "split")
    assert launched == ["dy", "x", "expand"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(layout: str, device: str) -> None:
    g = group("bf16+fp32", (7, 16, 3), device)
    strided = g.map(LAYOUTS[layout])
    assert not strided.x.is_contiguous()
    assert_all_same(forward(strided, "fused"), forward(g, "fused"))
    assert_all_same(backward(strided, "fused"), backward(g, "fused"))


def test_stride_zero(device: str) -> None:
    """What .sum() sends back: one value for all of an output."""
    g = group("bf16+fp32", (7, 16, 3), device)
    dys = [dy[:1, :1].expand(dy.shape) for dy in g.of("dy")]
    assert_all_same(backward(g, "fused", dy=dys), backward(g, "fused", dy=[dy.contiguous() for dy in dys]))


@pytest.mark.parametrize("how", ["fused", "split"])
@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_rows(rows: int, how: str, device: str) -> None:
    g = group("bf16+fp32", (7, 16, 3), device, PS["all"] if rows else PS["none"], (rows, K))
    ys, h = forward(g, how)
    assert h.shape == (rows, 26) and [y.shape for y in ys] == [(rows, N) for N in NS]
    grad, das, dbs = backward(g, how)
    peft, exact = exact_backward(g, lambda v: v, plain), exact_backward(g, double, reference)
    assert_close(grad, sum(peft[0][1:], peft[0][0]), sum(exact[0][1:], exact[0][0]), "dx")
    for i in range(3):
        assert_close(das[i], peft[1][i], exact[1][i], "da")
        assert_close(dbs[i], peft[2][i], exact[2][i], "db")


def test_ranks_of_several_blocks_beside_small_ones(device: str) -> None:
    """200 ranks are two blocks of 128; the members of one block sit the second out."""
    g = group("bf16+fp32", (200, 3, 130), device, sizes=(20, 40), Ns=(24, 8, 16))
    _, h = forward(g, "fused")
    for part, t, p, seed in zip(columns(h, g.of("a")), g.members, g.ps, g.seeds, strict=True):
        wide = t.map(double)
        hold(
            part, plain.shrink(t.x, t.a, p=p, seed=seed), reference.shrink(t.x, t.a, p=p, seed=seed),
            reference.shrink(wide.x, wide.a, p=p, seed=seed), "h",
        )  # fmt: skip
