"""Dispatch: a pure choice from checked-in tables, never an error, and always one that can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from tolerance import assert_close
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastlora_kernels
from fastlora import dispatch, ops
from fastlora.functional import lora_linear
from fastlora_kernels import Tile, device, strategy, table, tile
from fastlora_kernels.launch import on_device

TABLES = sorted(p.stem for p in (Path(fastlora_kernels.__file__).parent / "tables").glob("*.json"))
SIZES = (1, 7, 16, 17, 64, 512, 4096, 10**6)


def test_the_tables_that_must_exist_do() -> None:
    assert {"sm_80", "sm_90", "sm_100", "default", "interpreter"} <= set(TABLES)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "interpreter"])
def test_both_strategies_are_chosen_somewhere(name: str) -> None:
    chosen = {strategy(name, torch.bfloat16, M, 4096, 4096, 16)[0] for M in SIZES}
    assert chosen == {"fused", "split"}


def test_an_unknown_gpu_gets_the_defaults() -> None:
    assert table("sm_999")["name"] == "default"
    assert tile("expand", "sm_999", torch.bfloat16, 100, 100) == tile("expand", "default", torch.bfloat16, 100, 100)
    assert "default" in strategy("gfx000", torch.bfloat16, 8192, 4096, 4096, 16)[1]


def test_a_launch_takes_the_table_of_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 1 else (8, 0))
    device._cuda_arch.cache_clear()
    assert [device._cuda_arch(i) for i in (0, 1)] == ["sm_80", "sm_90"]
    device._cuda_arch.cache_clear()


def test_a_launch_goes_to_its_tensors_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another GPU current the launch enters the tensor's; with the tensor's own current it enters nothing."""

    class OnGPU:
        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d))
    on_device(OnGPU(0))  # type: ignore[arg-type]
    assert entered == []
    on_device(OnGPU(1))  # type: ignore[arg-type]
    assert entered == [torch.device("cuda", 1)]


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(20, 24).to(dtype), torch.randn(40, 24).to(dtype), torch.randn(4, 24), torch.randn(40, 4)


@pytest.mark.parametrize("asked", [None, "torch", "triton"])
def test_environment_and_argument(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b = layer(torch.bfloat16)
    monkeypatch.setattr(ops.few, "FEW_INPUTS", 0)  # no shortcut around the op
    seen: list[str] = []
    real = torch.ops.fastlora.lora_linear

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return real(*args)

    monkeypatch.setattr(torch.ops.fastlora, "lora_linear", spy)
    for outside in (None, "torch", "triton"):
        monkeypatch.setattr(dispatch.env, "backend", outside)
        lora_linear(x, w, None, a, b, 1.0, backend=asked)
        assert seen.pop() == (asked or outside or "torch"), "the argument wins, then the environment, then the device"
    monkeypatch.setattr(dispatch.env, "disable", True)
    lora_linear(x, w, None, a, b, 1.0)
    assert seen.pop() == "torch", "FASTLORA_DISABLE turns the kernels off"


def test_a_mistyped_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTLORA_BACKEND: got 'cuda', wanted one of"):
        dispatch.Environment()


@pytest.mark.parametrize("variable", ["FASTLORA_STRICT", "FASTLORA_DISABLE"])
def test_switches_in_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says on or off in any case, for itself alone; what says neither is refused."""

    def read() -> dict[str, bool]:
        env = dispatch.Environment()
        return {"FASTLORA_STRICT": env.strict, "FASTLORA_DISABLE": env.disable}

    for name in ("FASTLORA_STRICT", "FASTLORA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    off = read()
    assert off == {"FASTLORA_STRICT": False, "FASTLORA_DISABLE": False}
    for said in ("0", "false", "no", "off", "", "False", "OFF"):
        monkeypatch.setenv(variable, said)
        assert read() == off, said
    for said in ("1", "true", "yes", "on", "True", "ON"):
        monkeypatch.setenv(variable, said)
        assert read() == {**off, variable: True}, said
    for said in ("2", "maybe", " "):
        monkeypatch.setenv(variable, said)
        with pytest.raises(ValueError, match=f"{variable}: got {said!r}, wanted one of .*'true'.*'false'"):
            read()


def test_decisions_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 24)
    assert "backend='triton' is asked for" in dispatch.decide(x, 40, 4).why
    assert dispatch.decide(x, 40, 4, "torch").why == "backend='torch' was asked for"
    monkeypatch.setattr(ops.library, "kernels", None)
    assert dispatch.decide(x, 40, 4).why == "triton is not installed"
    monkeypatch.setattr(ops, "has_matmul", lambda dtype: dtype.itemsize > 2)
    assert dispatch.decide(x, 40, 4).why == "triton is not installed"
    assert dispatch.decide(x.bfloat16(), 40, 4).why.endswith("fp32, for this CPU has no matmul of bfloat16")
    assert dispatch.decide(x, 40, 4, dtype=torch.float16).why.endswith("fp32, for this CPU has no matmul of float16")
    monkeypatch.undo()
    decision = dispatch.decide(x, 40, 4, "triton")
    assert decision.path == "triton" and decision.strategy in ("fused", "split") and decision.tile
    assert "table interpreter" in str(decision)
    assert json.loads(json.dumps(decision.tile)) == decision.tile


def test_few_rows_on_a_gpu_run_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless something drops, whose mask is the kernels', or the kernels were asked for; a bank's rows stay theirs."""
    monkeypatch.setattr(ops, "triton_unavailable", lambda _: None)
    monkeypatch.setattr(ops.kernels, "arch", lambda _: "sm_90")
    with FakeTensorMode():
        few, many = (torch.empty(rows, 8, 64, device="cuda", dtype=torch.bfloat16) for rows in (2, 3))
    assert dispatch.backend_for(few) == "torch" and dispatch.backend_for(many) == "triton"
    assert dispatch.decide(few, 64, 4).why == (
        "few rows: calls cost more than arithmetic unless backend='triton' is asked for"
    )
    assert dispatch.decide(many, 64, 4).path == dispatch.decide(few, 64, 4, drops=True).path == "triton"
    assert dispatch.backend_for(few, "triton") == dispatch.backend_of(few) == "triton"
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    assert dispatch.backend_for(few) == "triton"


def test_the_tile_told_is_the_form_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16 bytes take tensor descriptors; with 4095 features the plain form runs, and is told."""
    monkeypatch.setattr(ops.kernels, "arch", lambda _: "sm_100")  # a table that no GPU has changed
    monkeypatch.setattr(ops, "triton_unavailable", lambda _: None)
    for K, N, tma in ((4096, 4096, True), (4095, 4096, False), (4096, 4095, False)):
        x = torch.empty(8192, K, dtype=torch.bfloat16, device="meta")
        decision = dispatch.decide(x, N, 16, "triton")
        assert decision.strategy == "fused" and decision.tile is not None and decision.tile["tma"] is tma
        assert Tile(**decision.tile) == tile("expand", "sm_100", torch.bfloat16, 8192, N, 16, tma=tma)


def test_fallbacks_are_said_once_per_reason_and_raise_under_strict(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    for where in ("layer 1", "layer 2"):
        dispatch.fell_back(where, "merged")
    dispatch.fell_back("layer 3", "hooked")
    assert [r.getMessage().split(" falls")[0] for r in caplog.records] == ["layer 1", "layer 3"]
    with pytest.raises(RuntimeError, match=r"layer 1: strict mode forbids a fallback.*merged"):
        dispatch.fell_back("layer 1", "merged", strict=True)
    monkeypatch.setattr(dispatch.env, "strict", True)
    with pytest.raises(RuntimeError, match="strict mode"):
        dispatch.fell_back("layer 1", "merged")


def test_forced_strategies_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layer fused and split, and by the table; each really runs its own kernels."""
    from fastlora_kernels import linear

    ran: list[str] = []
    for name in ("expand", "low_rank"):
        real = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, _n=name, _f=real, **kw: (ran.append(_n), _f(*args, **kw))[1])
    x, w, a, b = layer()
    results = {way: torch.ops.fastlora.lora_linear(x, w, None, a, b, None, None, 0.5, 0.0, way)[0]
               for way in ("fused", "split", "triton")}  # fmt: skip
    assert ran[:2] == ["expand", "low_rank"]
    chosen = strategy("interpreter", x.dtype, 20, 40, 24, 4)[0]
    assert torch.equal(results["triton"], results[chosen])


@pytest.mark.parametrize(
    ("main", "adapter", "launch"),
    [("float32", "float32", "low_rank"), ("bfloat16", "bfloat16", "low_rank"), ("float32", "bfloat16", "low_rank"),
     ("bfloat16", "float32", "add_expand"), ("float16", "bfloat16", "add_expand")],
)  # fmt: skip
def test_a_term_is_not_rounded_below_its_adapters_dtype(
    monkeypatch: pytest.MonkeyPatch, main: str, adapter: str, launch: str
) -> None:
    """Split, it comes before the vendor's GEMM in x's dtype; where b's is wider, behind it."""
    from fastlora_kernels import linear

    ran: list[str] = []
    for name in ("low_rank", "add_expand"):
        real = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, _n=name, _f=real, **kw: (ran.append(_n), _f(*args, **kw))[1])
    x, w, h, b = torch.randn(20, 24), torch.randn(40, 24), torch.randn(20, 4), torch.randn(40, 4)
    narrow, factor = getattr(torch, main), getattr(torch, adapter)
    x, w, b = x.to(narrow), w.to(narrow), b.to(factor)
    y = linear.expand_split(x, w, None, h, b, None, 0.5)
    assert ran == [launch] and y.dtype == narrow
    torch.testing.assert_close(y.double(), x.double() @ w.double().t() + 0.5 * h.double() @ b.double().t(),
                               rtol=2e-2, atol=2e-2 * 24**0.5)  # fmt: skip


def test_a_bias_that_cancels_the_product_is_not_rounded_before_it() -> None:
    """As a trained one does where a feature of x is large and the same in every row."""
    from fastlora_kernels.linear import expand_split

    x, w, h, b = (torch.randn(*size) for size in ((20, 24), (40, 24), (20, 4), (40, 4)))
    x[:, 0] = 256.0
    x, w, b, h = x.bfloat16(), w.bfloat16(), 0.1 * b.bfloat16(), h
    bias = (-256 * w[:, 0].float()).bfloat16()
    exact = plain.expand(*(t.double() for t in (x, w, bias, h, b)), 0.5)
    y = expand_split(x, w, bias, h, b, None, 0.5)
    assert_close(y, plain.expand(x, w, bias, h, b, 0.5), exact, "y")
