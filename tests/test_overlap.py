"""A second stream: when it is asked for, in which order the launches go, and, on a GPU, that no bit depends on it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from banked import take, tenant
from models import base_model, batch
from operands import SCALE, Layer, a_seed, layer
from tolerance import assert_same
from torch import nn

import fastlora_kernels as kernels
from fastlora import AdapterBank, dispatch
from fastlora_kernels import overlap

linear = import_module("fastlora_kernels.linear")
multi = import_module("fastlora.ops.multi")


def backward(t: Layer, how: str = "fused", want_dx: bool = True, want_da: bool = True) -> Any:
    seed = a_seed(t.x.device.type)
    return kernels.lora_backward(t.dy, t.x, t.w, t.a, t.b, t.h, seed, SCALE, 0.1, want_dx, want_da, True, how)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "interpreter", "sm_999"])
def test_it_is_off_until_it_is_measured(arch: str) -> None:
    row = kernels.table(arch).get("overlap")
    assert overlap.pays(arch) is (row is not None and row["da"])
    assert overlap.pays(arch, "shrink") is (row is not None and row["shrink"])
    assert row is None or row["source"] == "measured" or not (row["da"] or row["shrink"])


def test_a_cpu_has_one_stream() -> None:
    assert overlap.mark(torch.ones(1), True) is None
    with overlap.aside(torch.ones(1), None):
        pass
    assert not overlap.captured(torch.ones(1))


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

    for name in ("dy_pass", "dx", "low_rank_dx", "x_pass"):
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
    assert order == ["dy_pass", "x_pass", "low_rank_dx"]  # first, for it leaves its mask to dx
    order.clear()
    backward(t, want_dx=False)
    assert order == ["dy_pass", "stay", "x_pass", "stayed"]
    order.clear()
    backward(t, want_da=False)
    assert order == ["dy_pass", "dx"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[nn.Module, list[str]]]:
    """(a model with an adapter on q, k, v and o, in its batch, what it does in order) as if a graph captured it."""
    done: list[str] = []

    def logged(name: str) -> Any:
        launch = getattr(kernels, name)
        return lambda *args, **kwargs: (done.append(name), launch(*args, **kwargs))[1]

    def ahead(x: Any, make: Any) -> Any:
        done.append("fork")
        return make()

    model, targets = base_model(layers=1), ["q_proj", "k_proj", "v_proj", "o_proj"]
    base = copy.deepcopy(model)
    bank = AdapterBank(model, max_loras=2, max_total_rank=16, target_modules=targets)
    take(bank, "a", tenant(base, target_modules=targets))
    for name in targets:
        layer = model.get_submodule(f"model.layers.0.self_attn.{name}")
        layer.base_layer.register_forward_hook(lambda *_: done.append("base"))
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    for name in ("multi_shrink", "multi_expand"):
        monkeypatch.setattr(kernels, name, logged(name))
    monkeypatch.setattr(overlap, "captured", lambda x: True)
    monkeypatch.setattr(overlap, "pays", lambda arch, what="da": what == "shrink")
    monkeypatch.setattr(overlap, "ahead", ahead)
    monkeypatch.setattr(overlap, "join", lambda x: done.append("join"))
    with bank.use(["a", None, "a"]):
        yield model, done


def test_a_serving_graph_shrinks_beside_the_base(
    served: tuple[nn.Module, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fork, shrink, the base layers' own matmuls, join, expand; the same bits as one after the other."""
    model, done = served
    inputs = batch(rows=3, length=2)
    with torch.no_grad():
        beside = model(**inputs).logits
        three, one = ["base"] * 3, ["base"]
        assert done == [
            step for bases in (three, one) for step in ("fork", "multi_shrink", *bases, "join", "multi_expand")
        ]
        done.clear()
        monkeypatch.setattr(overlap, "captured", lambda x: False)
        assert_same(model(**inputs).logits, beside)
    assert "fork" not in done and "join" not in done and len(done) == 2 * 2 + 3 + 1


def test_a_base_that_raises_is_joined_too(served: tuple[nn.Module, list[str]]) -> None:
    model, done = served
    model.model.layers[0].self_attn.k_proj.base_layer.register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(**batch(rows=3, length=2))
    assert done == ["fork", "multi_shrink", "base", "base", "join"]


def test_what_autograd_watches_stays_in_one_stream(served: tuple[nn.Module, list[str]]) -> None:
    model, done = served
    model(**batch(rows=3, length=2))
    assert "fork" not in done


def test_rows_that_are_a_copy_are_made_on_the_second_stream(
    served: tuple[nn.Module, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stream would give a copy's memory to the base's output, while the shrink still reads it."""
    model, done = served
    q_proj, rows_of = model.model.layers[0].self_attn.q_proj, multi.rows_of
    monkeypatch.setattr(multi, "rows_of", lambda x: (done.append("copy"), rows_of(x))[1])
    with torch.no_grad():
        q_proj(torch.randn(4, 3, q_proj.base_layer.in_features).transpose(0, 1))
    assert done[:3] == ["fork", "copy", "multi_shrink"]


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
