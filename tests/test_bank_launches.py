"""What a bank launches: the kernels under a whole model, as many for many adapters, and buffers that replay."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from banked import bank_with, model_of, names, rows, tenant, tenants_of
from models import base_model, batch, logits
from tolerance import assert_same, one_rounding, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import dispatch, ops, serving


def test_the_kernels_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels under a whole model, by use and by prepare: the same rows as on the torch path."""
    models = tenants_of(base_model(layers=1), "llama")
    bank, inputs = bank_with(models), batch(rows=3, length=2)
    wanted = ["r7", None, "r64"]
    with bank.use(wanted):
        usual = logits(model_of(bank), inputs)
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    with bank.use(wanted):
        ours = logits(model_of(bank), inputs)
    bank.prepare(torch.tensor([bank.slot(name) for name in wanted]).repeat_interleave(2))
    prepared = logits(model_of(bank), inputs)
    bank.prepare(None)
    assert_same(prepared, ours)
    assert_same(ours[1], usual[1])
    assert 0 < relative_error(ours, usual.double()) < 16 * one_rounding(torch.float32)


def test_few_rows_with_the_matmul_in_the_same_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opt-in: the same rows to the tolerance, base rows too; more rows than asked for run as ever."""
    base = base_model(layers=1)
    models = tenants_of(base, "llama")
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    wanted, inputs = ["r7", None, "r64"], batch(rows=3, length=2)
    launched = mock.Mock(wraps=ops.kernels.multi_linear)
    monkeypatch.setattr(ops.kernels, "multi_linear", launched)
    results = {}
    for few, count in ((0, 0), (5, 0), (6, 7)):
        bank = bank_with(models, fused_rows=few)
        with bank.use(wanted):
            results[few] = logits(model_of(bank), inputs)
        assert launched.call_count == count, few
        bank.close()
    assert_same(results[5], results[0])
    assert 0 < relative_error(results[6], results[0].double()) < 16 * one_rounding(torch.float32)


def test_few_rows_that_do_not_fit_are_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too wide, or of another dtype: torch's own error, where a kernel would read past the rows of its weight."""
    base = base_model(layers=1)
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    bank = bank_with({None: base, "a": tenant(base)}, fused_rows=2)
    layer = model_of(bank).model.layers[0].self_attn.q_proj
    K = layer.base_layer.in_features
    with bank.use(["a"]), torch.no_grad():
        for x in (torch.randn(1, 2, K + 16), torch.randn(1, 2, K - 16), torch.randn(1, 2, K).half()):
            with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|same dtype"):
                layer(x)
        layer(torch.randn(1, 2, K))


def test_launches_do_not_grow_with_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight launches a decoder layer (q, k, v; o; gate, up; down: a shrink and an expand each), however many adapters;
    and on the torch path as many operators for five adapters as for two."""
    models = tenants_of(base_model(layers=2), "llama")
    bank, inputs = bank_with(models), batch(rows=5, length=2)
    counts = []
    for wanted in (["r4", "r64", "r4", "r64", "r4"], ["r1", "r4", "r7", "r16", "r64"]):
        with bank.use(wanted), Recorded() as recorded:
            logits(model_of(bank), inputs)
        with bank.use(wanted), Recorded() as recorded:  # the factors are gathered by now
            logits(model_of(bank), inputs)
        counts.append(len(recorded.names))
    assert counts[0] == counts[1]
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    kernels = ("multi_shrink", "multi_expand", "route")
    launches = {name: mock.Mock(wraps=getattr(ops.kernels, name)) for name in kernels}
    for name, counted in launches.items():
        monkeypatch.setattr(ops.kernels, name, counted)
    with bank.use(["r1", "r4", "r7", "r16", "r64"]):
        logits(model_of(bank), inputs)
    assert {name: counted.call_count for name, counted in launches.items()} == dict(
        multi_shrink=2 * 4, multi_expand=2 * 4, route=1
    )


@pytest.mark.gpu
@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "shrink beside the base"])
def test_a_captured_graph_replays_with_other_adapters(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once over `prepare`'s buffers; more, fewer and other adapters replay to the bits that a graph captured
    for them alone replays to. Eager has other bits, base rows too: cuBLAS multiplies otherwise under capture."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(ops.kernels.overlap, "pays", lambda arch, what="da": beside)
    models = tenants_of(base_model().cuda(), "llama")
    bank = bank_with(models)
    inputs = {"input_ids": batch(rows=4, length=3)["input_ids"].cuda()}
    slots = {name: bank.slot(name) for name in models if name}

    def prepare(wanted: list[str | None]) -> None:
        routed = torch.tensor([slots.get(name, -1) for name in wanted], device="cuda")
        bank.prepare(routed.repeat_interleave(3))

    def captured() -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits(model_of(bank), inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = logits(model_of(bank), inputs)
        return graph, result

    prepare(["r4", None, "r7", "r4"])
    graph, replayed = captured()
    for wanted in (["r16", "r64", "r1", None], [None] * 4, ["r7"] * 4, ["r4", None, "r7", "r4"]):
        prepare(wanted)
        graph.replay()
        got = replayed.clone()
        own, alone = captured()
        own.replay()
        assert_same(got, alone)
        assert relative_error(got, logits(model_of(bank), inputs).double()) < 16 * one_rounding(torch.float32)
    bank.prepare(None)


class Recorded(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_prepare_reuses_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """More, fewer and other adapters through the same buffers: a copy, a look-up and two launches, no allocation, no
    sync. (What a mapping on the host is checked with comes before; on the device there is no such check.)"""
    models = tenants_of(base_model(), "llama")
    bank = bank_with(models)
    slots = [bank.slot(name) for name in models if name]
    routed = []
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    monkeypatch.setattr(ops.kernels, "route", lambda slots, routes: routed.append((slots, routes)))
    bank.prepare(torch.full((6,), -1))
    for mapping in ([*slots, -1], [slots[2]] * 6, [-1] * 6):
        asked = torch.tensor(mapping, dtype=torch.int32)
        with Recorded() as recorded:
            bank.prepare(asked)
        checks, copies = recorded.names[:3], recorded.names[3:]
        assert checks == ["aten::aminmax", *["aten::_local_scalar_dense"] * 2]
        assert copies == ["aten::copy_", "aten::clamp_", "aten::add_.Tensor", "aten::index_select.out"]
        assert routed[-1][0] is routed[0][0] and routed[-1][1] is routed[0][1]
        assert routed[-1][0].tolist() == mapping
    bank.prepare(None)
    assert serving.turn_of(bank._attached.tables) is None


def test_prepare_replays_as_a_graph_would() -> None:
    models = tenants_of(base_model(), "llama")
    bank, inputs = bank_with(models), batch(rows=4, length=3)
    base = logits(models[None], inputs)
    for mapping in ([0, 1, None, 2], [3, 3, 3, 3], [None, None, None, 4], [None] * 4, [1, 0, 4, 3]):
        with bank.use(names(mapping)):
            usual = logits(model_of(bank), inputs)
        slots = torch.tensor([bank.slot(name) for name in names(mapping)], dtype=torch.int32)
        bank.prepare(slots.repeat_interleave(3))
        assert_same(
            logits(model_of(bank), inputs)[[name is None for name in names(mapping)]],
            base[[m is None for m in mapping]],
        )
        assert relative_error(logits(model_of(bank), inputs), usual.double()) < 16 * one_rounding(torch.float32)
    with pytest.raises(ValueError, match="12 rows that were prepared"):
        logits(model_of(bank), rows(inputs, 0))
    bank.prepare(None)
    assert_same(logits(model_of(bank), inputs), base)


def test_a_mapping_that_names_a_deleted_slot_is_base_only() -> None:
    models = tenants_of(base_model(), "llama")
    bank, inputs = bank_with(models), batch(rows=2, length=3)
    slots = [bank.slot("r4"), bank.slot("r16")]
    bank.prepare(torch.tensor(slots).repeat_interleave(3))
    before = logits(model_of(bank), inputs)
    bank.delete_adapter("r4")
    after = logits(model_of(bank), inputs)
    bank.prepare(None)
    base = logits(models[None], inputs)
    assert_same(after[0], base[0])
    assert not torch.equal(before[0], base[0]) and not torch.equal(after[1], base[1])


def test_layers_that_no_adapter_of_the_batch_adapts_cost_nothing() -> None:
    """On q and v alone: one shrink a decoder layer, and an expand each for q and v; k, o and the MLP are the base's."""
    base = base_model(layers=2)
    models = {None: base, "a": tenant(base, target_modules=["q_proj", "v_proj"])}
    bank, inputs = bank_with({**models, "b": tenant(base, target_modules=["q_proj"])}), batch(rows=2, length=3)
    with bank.use(["a", "b"]):
        served = logits(model_of(bank), inputs)
        with Recorded() as recorded:
            logits(model_of(bank), inputs)
    with Recorded() as alone:
        logits(base, inputs)
    names = ("aten::bmm", "aten::baddbmm_")
    assert [recorded.names.count(name) - alone.names.count(name) for name in names] == [2, 4]
    assert relative_error(served[0], logits(models["a"], rows(inputs, 0))[0].double()) < 16 * one_rounding(
        torch.float32
    )
