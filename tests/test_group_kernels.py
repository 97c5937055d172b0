"""Layers that share one input, in launches together: against their twins one by one, and who is read how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import plain
import pytest
import torch
from operands import LAYOUTS, Layer, bf16, double, fp32, layer, small_tile
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile
from fastlora_kernels.members import columns

pytestmark = pytest.mark.usefixtures("poison")

M, K, NS = 45, 72, (56, 24, 40)
"""No multiple of a tile; rows of 16 bytes, so that descriptors can address all but the odd ones of ODD_NS."""
ODD_NS = (51, 1, 37)
SCALES = (1.7, -0.4, 1.0)
PS = {"none": (0.0, 0.0, 0.0), "all": (0.3, 0.1, 0.5), "some": (0.0, 0.3, 0.0)}
CASES = [
    ("fp32", (1, 7, 16), "some"),
    ("fp32", (33, 1), "all"),
    ("fp16", (1, 16), "some"),
    ("fp16", (7, 16, 33), "all"),
    ("bf16", (7, 33, 1), "some"),
    ("bf16+fp32", (16, 16, 16), "all"),
    ("bf16+fp32", (33, 512, 7), "all"),
    ("bf16+fp32", (16, 7), "none"),
    ("fp32+bf16", (7, 1), "none"),
    ("bf16+bf16,fp32", (16, 33, 7), "some"),
]
cases = pytest.mark.parametrize(
    ("mix", "Rs", "ps"), [(mix, Rs, PS[ps]) for mix, Rs, ps in CASES], ids=[f"{m}-{r}-{p}" for m, r, p in CASES]
)
dropout = pytest.mark.parametrize("ps", PS.values(), ids=PS)


@dataclass(frozen=True)
class Group:
    """Layers and what they share; an operand of `Layer` is its member's own, but for x."""

    x: Tensor
    members: tuple[Layer, ...]
    seeds: Tensor
    ps: tuple[float, ...]

    def of(self, name: str) -> list[Tensor]:
        return [getattr(t, name) for t in self.members]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def scales(self) -> tuple[float, ...]:
        return SCALES[: len(self)]

    @property
    def drop(self) -> dict[str, Any]:
        return {"ps": self.ps, "seeds": self.seeds}

    def map(self, change: Callable[[Tensor], Tensor]) -> Group:
        return replace(self, x=change(self.x), members=tuple(t.map(change) for t in self.members))


def group(
    mix: str,
    Rs: Sequence[int],
    device: str = "cpu",
    ps: Sequence[float] = PS["all"],
    sizes: tuple[int, int] = (M, K),
    Ns: Sequence[int] = NS,
) -> Group:
    members = [layer(mix, R, device, *sizes, N) for R, N in zip(Rs, Ns, strict=False)]
    x = members[0].x
    seeds = torch.tensor([-(2**62) - 12345, 7, 2**61 + 3][: len(members)], device=device)
    return Group(x, tuple(replace(t, x=x) for t in members), seeds, tuple(ps[: len(members)]))


def each(g: Group, one: Callable[..., Any], *names: str) -> list[Any]:
    """`one` of every member: of the operands named, under its own mask."""
    return [
        one(*(getattr(t, name) for name in names), p=p, seed=seed)
        for t, p, seed in zip(g.members, g.ps, g.seeds, strict=True)
    ]


def hold(actual: Tensor, peft: Tensor, twin: Tensor, exact: Tensor, what: str) -> None:
    assert actual.dtype == twin.dtype, f"{what}: dtype {actual.dtype}, wanted {twin.dtype}"
    assert_close(actual, peft, exact, what)
    assert_close(actual, twin, exact, f"{what} beside its twin")


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


YARDS = ((plain, lambda v: v), (reference, lambda v: v), (reference, double))
"""PEFT's formulation, the twin, and the truth."""


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
def test_add_dx(mix: str, Rs: tuple[int, ...], ps: tuple[float, ...], device: str) -> None:
    """The low-rank terms alone, and in place over a base that they leave as it is where they are 0."""
    g = group(mix, Rs, device, ps)
    args, config = (g.of("dh"), g.of("a"), g.x.dtype), small_tile(max(Rs))
    alone = kernels.group_add_dx(None, *args, **g.drop, config=config)
    hold(alone, *dx_yards(g, base=False), "dx without w")
    place = g.x.clone()
    assert kernels.group_add_dx(place, *args, **g.drop, config=config) is place
    wide = g.map(double)
    exact = wide.x + dx_yards(g, base=False)[2]
    assert_close(place, plain_sum(g), exact, "dx in place")
    zeros = [torch.zeros_like(dh) for dh in g.of("dh")]
    assert_same(kernels.group_add_dx(g.x.clone(), zeros, *args[1:], **g.drop, config=config), g.x)


def plain_sum(g: Group) -> Tensor:
    return g.x + dx_yards(g, base=False)[0]


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
    assert_same(kernels.group_add_dx(None, column, rows, fp32, ps=ps, seeds=seeds, config=config), total)
    zero = ones.to(bf16) * 0
    grad = kernels.group_dx(
        [zero], [zero], column[:1], rows[:1], ps=ps[:1], seeds=seeds, config=replace(config, tma=True)
    )
    assert_same(grad, masks[0].to(bf16))


def assert_all_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert_same(left, right)
    elif left is None:
        assert right is None
    else:
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_all_same(one, other)


def forward(g: Group, how: str = "triton", **changed: Any) -> tuple[list[Tensor], Tensor]:
    given = {name: g.of(name) for name in ("w", "bias", "a", "b", "lora_bias")} | changed
    return kernels.group_linear(
        g.x, given["w"], given["bias"], given["a"], given["b"], given["lora_bias"], g.seeds, g.scales, g.ps, how
    )


def backward(g: Group, how: str = "triton", want: Sequence[Any] = (True, True, True), **changed: Any) -> Any:
    given = {name: g.of(name) for name in ("dy", "w", "a", "b")} | {"x": g.x, "h": torch.cat(g.of("h"), 1)} | changed
    want_dx, *rest = want
    want_das, want_dbs = ([one] * len(g) if isinstance(one, bool) else one for one in rest)
    return kernels.group_backward(
        given["dy"], given["x"], given["w"], given["a"], given["b"], given["h"], g.seeds, g.scales, g.ps,
        want_dx, want_das, want_dbs, how,
    )  # fmt: skip


def exact_backward(
    g: Group, wide: Callable[[Any], Any], module: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(dx of each member, das, dbs)."""
    dxs, das, dbs = [], [], []
    for t, scale, p, seed in zip(g.map(wide).members, g.scales, g.ps, g.seeds, strict=True):
        dh, db = module.dy_pass(t.dy, t.h, t.b, scale)
        dxs.append(module.dx(t.dy, t.w, dh, t.a, p=p, seed=seed))
        das.append(module.x_pass(t.x, dh, t.a.dtype, p=p, seed=seed))
        dbs.append(db)
    return dxs, das, dbs


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
    """Sums cut as large operands' are: three parts of the columns, and bands of 64 rows."""
    for name in ("shrink", "dy_pass", "x_pass"):
        module = import_module(f"fastlora_kernels.{name}")
        monkeypatch.setattr(module, "chunks", lambda *_, **__: (3, 64), raising=False)
        monkeypatch.setattr(module, "bands", lambda M, *_: (-(-M // 64), 64), raising=False)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("how", ["fused", "split"])
def test_split_sums_have_the_same_bits_in_two_runs(how: str, launched: list[str], device: str) -> None:
    """Two bands, the last one short; a member with fewer columns than parts."""
    g = group("bf16+fp32", (5, 1, 33), device, sizes=(100, 130), Ns=(140, 70, 3))
    ys, h = forward(g, how)
    grad, das, dbs = backward(g, how)
    assert launched == ["shrink", "reduce", *["expand"] * 3, "dy", "reduce", "reduce", "expand", "x", "reduce"]
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

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for module, name in (
        ("shrink", "shrink"), ("dy_pass", "dy"), ("x_pass", "x"), ("expand", "expand"), ("persistent", "persistent"),
        ("reduce", "reduce"),
    ):  # fmt: skip
        home = import_module(f"fastlora_kernels.{module}")
        monkeypatch.setattr(home, f"_{name}_kernel", Counted(name, getattr(home, f"_{name}_kernel")))
    return names


def test_one_launch_a_pass(launched: list[str], device: str) -> None:
    """x is read once for every h and once for every da, each dy once for dh and db, and dx is written once."""
    g = group("bf16+fp32", (16, 7, 33), device, sizes=(70, 72))
    forward(g, "fused")
    assert launched == ["shrink", "expand", "expand", "expand"]
    launched.clear()
    backward(g, "fused")
    assert launched == ["dy", "expand", "x"]
    launched.clear()
    backward(g, "split")
    assert launched == ["dy", "expand", "x"]


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
