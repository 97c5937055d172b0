"""The whole layer, forward and backward, over drawn shapes, ranks, dtypes, strides and dropout, against autograd.

A layer of two rows and rank 1 has so few roundings that their ratio is luck: all results of one are judged together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import LAYOUTS, MIXES, SCALE, a_seed, double, layer
from poison import poisoned
from tolerance import assert_all_close
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference

MAINS = {main: [mix for mix in MIXES if mix.startswith(main)] for main in ("fp32", "fp16", "bf16")}
LEAVES = ("x", "a", "b")
layouts = st.sampled_from([None, *LAYOUTS])
sizes = st.integers(8, 150)


@dataclass(frozen=True)
class Case:
    """One drawn layer: its sizes, the layouts of x, w, adapters and dy, and what is optional."""

    how: str
    R: int
    M: int
    K: int
    N: int
    x: str | None
    w: str | None
    adapter: str | None
    dy: str | None
    p: float
    bias: bool
    lora_bias: bool


cases = st.builds(
    Case,
    how=st.sampled_from(["fused", "split", "triton", "update"]),
    R=st.integers(1, 40),
    M=st.integers(2, 70),
    K=sizes,
    N=sizes,
    x=layouts,
    w=layouts,
    adapter=layouts,
    dy=st.sampled_from([None, "expanded", *LAYOUTS]),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    bias=st.booleans(),
    lora_bias=st.booleans(),
)


def laid(t: Tensor, layout: str | None) -> Tensor:
    if layout == "expanded":
        return t[:1].expand(t.shape)
    return t if layout is None else LAYOUTS[layout](t)


def drawn(case: Case, mix: str, device: str) -> dict[str, Any]:
    t = layer(mix, case.R, device, case.M, case.K, case.N)
    return {
        "x": laid(t.x, case.x),
        "w": laid(t.w, case.w),
        "bias": t.bias if case.bias else None,
        "a": laid(t.a, case.adapter),
        "b": laid(t.b, case.adapter),
        "lora_bias": t.lora_bias if case.lora_bias else None,
        "dy": laid(t.dy, case.dy),
        "base": torch.randn(case.M, case.N).to(t.dy),
        "seed": a_seed(device) if case.p else None,
        "dtype": t.x.dtype,
    }


def by_autograd(module: Any, t: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """y, dx, da and db by the twins in `module`; an update's dx is the low-rank term's alone."""
    x, a, b = leaves = [t[name].detach().requires_grad_() for name in LEAVES]
    if case.how == "update":
        h = module.shrink(x, a, p=case.p, seed=t["seed"])
        y = module.add_expand(t["base"], h, b, SCALE, t["lora_bias"], t["dtype"])
    else:
        optional = {"dropout_p": case.p, "lora_bias": t["lora_bias"], "seed": t["seed"]}
        y = module.lora_linear(x, t["w"], t["bias"], a, b, SCALE, **optional)
    grads = torch.autograd.grad(y, leaves, t["dy"])
    return {"y": y.detach(), **dict(zip(("dx", "da", "db"), grads, strict=True))}


def by_kernels(t: dict[str, Any], case: Case) -> dict[str, Tensor]:
    low_rank = t["a"], t["b"], t["lora_bias"], t["seed"], SCALE, case.p
    how, w = (case.how, t["w"]) if case.how != "update" else ("triton", None)
    if w is None:
        y, h = kernels.lora_update(t["base"], t["x"], *low_rank, t["dtype"])
    else:
        y, h = kernels.lora_linear(t["x"], w, t["bias"], *low_rank, how)
    dx, da, db = kernels.lora_backward(
        t["dy"], t["x"], w, t["a"], t["b"], h, t["seed"], SCALE, case.p, True, True, True, how
    )
    assert dx is not None and da is not None and db is not None
    return {"y": y, "dx": dx, "da": da, "db": db}


@pytest.mark.parametrize("main", MAINS)
@settings(max_examples=15)
@given(data=st.data())
def test_the_layer_by_the_policy(main: str, data: st.DataObject, device: str) -> None:
    case = data.draw(cases)
    torch.manual_seed(0)
    t = drawn(case, data.draw(st.sampled_from(MAINS[main])), device)
    with poisoned():
        actual = by_kernels(t, case)
    peft = by_autograd(plain, t, case)
    exact = by_autograd(reference, {name: double(value) for name, value in t.items()}, case)
    assert_all_close([(actual, peft, exact)])
