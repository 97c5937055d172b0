"""A group of layers that share one input: its operands, the launches of all of them, and their yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import plain
import pytest
import torch
from operands import Layer, double, layer
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference

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


YARDS = ((plain, lambda v: v), (reference, lambda v: v), (reference, double))
"""PEFT's formulation, the twin, and the truth."""


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
