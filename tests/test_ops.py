"""torch.ops.fastlora.*: what torch asks of an op, one graph under torch.compile, and what a layer saves."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from tolerance import assert_close, assert_same
from torch import Tensor, nn

import fastlora
from fastlora.functional import lora_linear, lora_update

WAYS = ("torch", "triton", "fused", "split")


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (2, 3, 8), "w": (6, 8), "bias": (6,), "a": (2, 8), "b": (6, 2), "lora_bias": (6,)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("way", WAYS)
def test_opcheck(way: str, seed: int | None) -> None:
    t = operands()
    drawn = None if seed is None else torch.tensor(seed)
    base = torch.randn(2, 3, 6, requires_grad=True)
    linear = (t["x"], t["w"], t["bias"], t["a"], t["b"], t["lora_bias"], drawn, 0.5, 0.2, way)
    torch.library.opcheck(torch.ops.fastlora.lora_linear, linear)
    update = (base, t["x"], t["a"], t["b"], t["lora_bias"], drawn, 0.5, 0.2, torch.float32, way)
    torch.library.opcheck(torch.ops.fastlora.lora_update, update)
    frozen = {name: v.detach() for name, v in t.items()}
    backward = (base.detach(), frozen["x"], frozen["w"], frozen["a"], frozen["b"], torch.randn(6, 2), drawn, 0.5, 0.2)
    torch.library.opcheck(torch.ops.fastlora.lora_backward, (*backward, True, True, True, way))
    part = (base.detach(), None, None, frozen["a"], frozen["b"], None, drawn, 0.5, 0.2, True, False, False, way)
    torch.library.opcheck(torch.ops.fastlora.lora_backward, part)


@pytest.mark.parametrize("way", WAYS)
def test_the_op_alone_differentiates_as_the_function_does(way: str) -> None:
    t = operands()
    dy = torch.randn(2, 3, 6)
    seed = torch.tensor(9)
    y, h = torch.ops.fastlora.lora_linear(
        t["x"], t["w"], t["bias"], t["a"], t["b"], t["lora_bias"], seed, 0.5, 0.2, way
    )
    assert not h.requires_grad and h.shape == (6, 2) and h.dtype == torch.float32
    alone = torch.autograd.grad(y, list(t.values()), dy)
    ours = fastlora.functional.linear._LoRALinear.apply(
        t["x"], t["w"], t["bias"], t["a"], t["b"], t["lora_bias"], seed, 0.5, 0.2, way
    )
    for left, right in zip(alone, torch.autograd.grad(ours, list(t.values()), dy), strict=True):
        assert_same(left, right)


class Block(nn.Module):
    """Two layers, the second over a base of its own kind."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.first = fastlora.LoRALinear(8, 6, r=2, lora_dropout=p)
        nn.init.normal_(self.first.lora_B.weight)
        self.base = nn.Linear(6, 5)
        self.a, self.b = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(5, 3))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))  # exact under any compiler
        return lora_update(self.base(x), x, self.a, self.b, 0.5, dropout_p=self.p, training=self.training)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(4)
    y = model(x)
    y.square().sum().backward()
    grads = {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


def collector() -> tuple[list[torch.fx.GraphModule], Any]:
    """A compiler that keeps each graph it is given and runs it as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    return graphs, keep


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_graph_without_breaks(backend: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastlora.dispatch.env, "backend", backend)
    model, x = Block(p), torch.randn(7, 8)
    graphs, count = collector()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=count)(x)
    assert len(graphs) == 1
    called = {node.target for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert {torch.ops.fastlora.lora_linear, torch.ops.fastlora.lora_update} <= {
        getattr(target, "overloadpacket", target) for target in called
    }
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    for name, value in gradients(model, x).items():
        assert_same(compiled[name], value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, and this machine has none")
def test_inductor_compiles_a_training_step() -> None:
    model, x = Block(0.0), torch.randn(7, 8)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True), x)
    plain, exact = gradients(model, x), gradients(copy.deepcopy(model).double(), x.double())
    assert list(compiled) == list(plain)
    # Inductor regroups the sums around our ops, so it is held to the policy as a whole, not to bits
    assert_close(*(torch.cat([t.flatten() for t in run.values()]) for run in (compiled, plain, exact)), "training step")


def test_new_row_counts_do_not_recompile() -> None:
    model = Block(0.0)
    torch._dynamo.reset()
    graphs, count = collector()
    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for rows in (3, 5, 8, 13, 21):
        compiled(torch.randn(rows, 8))
    assert len(graphs) == 1


def saved_bytes(run: Any, known: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward in storages other than `known`'s."""
    storages: dict[int, int] = {}
    mine = {t.untyped_storage().data_ptr() for t in known}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    assert kept is not None
    return sum(storages.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_layer_saves_h_and_a_seed(backend: str, adapter: torch.dtype, p: float) -> None:
    """Beyond x: M·R fp32 and 8 bytes, with dropout or without: a quarter of what PEFT's formulation saves, or less."""
    M, K, N, R = 64, 96, 80, 4
    x = torch.randn(M, K).bfloat16().requires_grad_()
    w, bias = torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    a, b = (torch.randn(s).to(adapter).requires_grad_() for s in ((R, K), (N, R)))
    known = [x, w, bias, a, b]
    ours = saved_bytes(lambda: lora_linear(x, w, bias, a, b, 0.5, dropout_p=p, backend=backend), known)
    assert 0 < ours <= 4 * M * R + (8 if p else 0)

    def plain() -> Tensor:
        linear, inner = nn.functional.linear, nn.functional.dropout(x.to(adapter), p)
        return (linear(x, w, bias) + linear(linear(inner, a), b) * 0.5).to(x.dtype)

    if p or adapter == torch.float32:
        assert saved_bytes(plain, known) >= 4 * ours


def test_frozen_factors_are_not_kept() -> None:
    """With A frozen (LoRA-FA) x need not outlive forward; without any gradient nothing is saved."""
    x, w = torch.randn(64, 96, requires_grad=True), torch.randn(80, 96)
    a, b = torch.randn(4, 96), torch.randn(80, 4, requires_grad=True)
    assert saved_bytes(lambda: lora_linear(x, w, None, a, b, 0.5), [w, a, b]) == 4 * 64 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: lora_linear(x, w, None, a, b, 0.5), []) == 0
