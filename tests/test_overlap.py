"""da beside dx: when it is asked for, in which order the launches go, and, on a GPU, that no bit depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from operands import SCALE, Layer, a_seed, layer
from tolerance import assert_same

import fastlora_kernels as kernels
from fastlora_kernels import overlap

linear = import_module("fastlora_kernels.linear")


def backward(t: Layer, how: str = "fused", want_dx: bool = True, want_da: bool = True) -> Any:
    seed = a_seed(t.x.device.type)
    return kernels.lora_backward(t.dy, t.x, t.w, t.a, t.b, t.h, seed, SCALE, 0.1, want_dx, want_da, True, how)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "interpreter", "sm_999"])
def test_it_is_off_until_it_is_measured(arch: str) -> None:
    row = kernels.table(arch).get("overlap")
    assert overlap.pays(arch) is (row is not None and row["da"])
    assert row is None or row["source"] == "measured" or not row["da"]


def test_a_cpu_has_one_stream() -> None:
    assert overlap.mark(torch.ones(1), True) is None
    with overlap.aside(torch.ones(1), None):
        pass


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a backward does, in order, where the table asks for the overlap."""
    done: list[str] = []

    def logged(name: str) -> Any:
        launch = getattr(linear, name)
        return lambda *args, **kwargs: (done.append(name), launch(*args, **kwargs))[1]

    @contextlib.contextmanager
    def aside(_: Any, since: Any) -> Iterator[None]:
        done.append("fork" if since else "stay")
        yield
        done.append("join" if since else "stayed")

    for name in ("dy_pass", "dx", "add_dx", "x_pass"):
        monkeypatch.setattr(linear, name, logged(name))
    monkeypatch.setattr(linear, "pays", lambda arch: True)
    monkeypatch.setattr(linear, "mark", lambda x, wanted: done.append("mark") or "an event" if wanted else None)
    monkeypatch.setattr(linear, "aside", aside)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: done.append("record"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return done


def test_da_starts_where_dx_does_and_is_launched_behind_it(order: list[str]) -> None:
    backward(layer("bf16+fp32", 7))
    assert order == ["dy_pass", "mark", "dx", "fork", "x_pass", "join", "record"]


def test_it_takes_a_fused_dx_to_run_beside(order: list[str]) -> None:
    t = layer("bf16+fp32", 7)
    backward(t, how="split")
    assert order == ["dy_pass", "add_dx", "stay", "x_pass", "stayed"]
    order.clear()
    backward(t, want_dx=False)
    assert order == ["dy_pass", "stay", "x_pass", "stayed"]
    order.clear()
    backward(t, want_da=False)
    assert order == ["dy_pass", "dx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_overlap_changes_no_bit(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    t = layer("bf16", 16, "cuda", 2048, 1024, 1024)
    alone = backward(t)
    monkeypatch.setattr(linear, "pays", lambda arch: True)
    beside = backward(t)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            beside = backward(t)
        graph.replay()
    for one, other in zip(alone, beside, strict=True):
        assert_same(one, other)
