"""Few rows on a CPU, where a call into torch costs more than its arithmetic: how many calls a training step makes."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from tolerance import assert_same
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastlora import LoRALinear
from fastlora.eager import base, drop, few
from fastlora.functional import draw_seed, lora_linear
from fastlora.reference import dropout_scale

MIXES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}


def operands(mix: str, M: int, K: int = 48, N: int = 64, R: int = 4) -> dict[str, Tensor]:
    main, adapter = MIXES[mix]
    shapes = {"x": ((M, K), main), "a": ((R, K), adapter), "b": ((N, R), adapter)}
    leaves = {name: torch.randn(shape).to(dtype).requires_grad_() for name, (shape, dtype) in shapes.items()}
    return {**leaves, "w": torch.randn(N, K).to(main), "dy": torch.randn(M, N).to(main)}


def step(t: dict[str, Tensor], p: float) -> tuple[Tensor, ...]:
    y = lora_linear(t["x"], t["w"], None, t["a"], t["b"], 2.0, dropout_p=p)
    return y, *torch.autograd.grad(y, (t["x"], t["a"], t["b"]), t["dy"])


def calls(run: Any) -> Counter[str]:
    """The operators that Python or autograd called, without those that operators call inside."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    outer: Counter[str] = Counter()
    end = -1
    for event in sorted(
        (e for e in profiler.events() if e.name.startswith("aten::")), key=lambda e: e.time_range.start
    ):
        if event.time_range.start >= end:
            outer[event.name] += 1
            end = event.time_range.end
    return outer


@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize("mix", MIXES)
def test_a_training_step_makes_few_calls(mix: str, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight products, dy scaled, three views; where dtypes are mixed x twice, y, dy and dx cast, y and dx copied.

    So on a CPU that multiplies 16 bits; one that does not has bands of w to copy, which take longer than any call.
    Dropout adds a seed, the mask's two calls in either pass, and what it is laid on: x in either pass, and dh·a; laying
    it on x is its cast to fp32, and 16 bits need a place to be laid. Of mixed dtypes, and of fewer than 4 rows, dx is a
    sum then.
    """
    monkeypatch.setattr(base, "has_matmul", lambda dtype: True)
    t = operands(mix, M)
    mixed = mix == "bf16+fp32"
    assert sum(calls(lambda: step(t, 0.0)).values()) <= 8 + 1 + 3 + 7 * mixed
    dropped = 1 + 2 * 2 + 3 - 2 * mixed + 3 * (mix == "bf16") + (M < 4)
    assert sum(calls(lambda: step(t, 0.1)).values()) <= 8 + 1 + 3 + 6 * mixed + dropped
    with torch.no_grad():
        assert sum(calls(lambda: lora_linear(t["x"], t["w"], None, t["a"], t["b"], 2.0)).values()) <= 4 + 3 * mixed


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("M", "K", "R", "wide"),
    [(1, 3072, 16, True), (16, 1024, 16, True), (1, 32, 16, False), (64, 1024, 16, False), (4, 1024, 64, False)],
    ids=["a row", "sixteen", "a few products", "many rows", "a large factor"],
)
def test_16_bits_run_in_fp32_where_their_call_costs_more(
    M: int, K: int, R: int, wide: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing between is rounded to 16 bits, and each gradient once; as they are, h and dh are rounded too."""
    monkeypatch.setattr(base, "has_matmul", lambda dtype: True)
    t = operands("bf16", M, K, 32, R)
    seed = torch.tensor(3) if p else None
    mask = 1.0 if seed is None else drop(torch.ones(M, K), seed, p, torch.float64) * dropout_scale(p)
    x, a, b, dy = (t[name].detach().double() for name in ("x", "a", "b", "dy"))
    with torch.no_grad():
        h = few.forward(t["x"], t["w"], None, t["a"], t["b"], None, seed, 2.0, p)[1]
        da, db = few.backward(
            t["dy"], t["x"], None, t["a"], t["b"], h, seed, 2.0, p, want_dx=False, want_da=True, want_db=True
        )[1:]
    dh = 2.0 * dy @ b
    for got, exact in ((da, dh.t() @ (x * mask)), (db, 2.0 * dy.t() @ ((x * mask) @ a.t()))):
        same = float((got == exact.to(torch.bfloat16)).double().mean())
        assert same > 0.99 if wide else same < 0.9
    assert h.dtype is (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [(1, 48), (1, 1030), (7, 48), (16, 256)])
def test_the_op_gives_the_same_bits(mix: str, p: float, size: tuple[int, int]) -> None:
    """Whoever goes through torch.ops.fastlora (a compiler, a dispatch mode) gets what the short way gives."""
    t = operands(mix, *size)
    torch.manual_seed(3)
    short = step(t, p)
    torch.manual_seed(3)
    seed = draw_seed(t["x"]) if p else None
    y, h = torch.ops.fastlora.lora_linear(t["x"], t["w"], None, t["a"], t["b"], None, seed, 2.0, p, "torch")
    assert h.dtype == torch.float32
    for left, right in zip(short, (y, *torch.autograd.grad(y, (t["x"], t["a"], t["b"]), t["dy"])), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_few_rows_save_h_at_the_most(mix: str, p: float) -> None:
    """Beyond x and the weights, M·R elements: the 8-byte seed is held beside; there is no mask and no dropped x."""
    M, R = 16, 4
    t, kept = operands(mix, M), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        lora_linear(t["x"], t["w"], None, t["a"], t["b"], 2.0, dropout_p=p)
    known = {v.data_ptr() for v in t.values()}
    others = [s for s in kept if s.data_ptr() not in known]
    assert [s.shape for s in others] == [(M, R)] and sum(s.nbytes for s in others) <= 4 * M * R


def test_a_second_derivative_raises_and_autocast_in_backward_changes_nothing() -> None:
    t = operands("fp32", 4)
    y = lora_linear(t["x"], t["w"], None, t["a"], t["b"], 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        there = torch.autograd.grad(y, (t["x"], t["a"], t["b"]), t["dy"], retain_graph=True)
    for left, right in zip(
        there, torch.autograd.grad(y, (t["x"], t["a"], t["b"]), t["dy"], retain_graph=True), strict=True
    ):
        assert_same(left, right)
    steps = lora_linear(t["x"][:, None], t["w"], None, t["a"], t["b"], 2.0)  # of three dimensions
    for out, autocast in product((y, steps), (False, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            dys = torch.stack((t["dy"], 2 * t["dy"])).view(2, *out.shape)
            many = torch.autograd.grad(out, (t["x"], t["a"], t["b"]), dys, retain_graph=True, is_grads_batched=True)
        for left, right in zip(many, there, strict=True):
            torch.testing.assert_close(left[1], 2 * right)
    (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("M", [2, 512])
def test_a_trace_writes_the_op_down(M: int) -> None:
    """Of an autograd rule torch.jit.trace would make a call into Python, or with few rows a crash."""
    layer, x = LoRALinear(512, 8), torch.randn(M, 512)
    torch.nn.init.normal_(layer.lora_B.weight)
    traced = torch.jit.trace(layer, torch.randn(M, 512))
    assert "fastlora::lora_linear" in str(traced.graph)
    assert_same(traced(x), layer(x))
    traced(x).sum().backward()
    assert layer.lora_A.weight.grad is not None
