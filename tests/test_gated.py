"""The gated MLP: every output and gradient for each activation, the op's own face, and what is saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from operands import ACTS, scaled_mask
from tolerance import assert_all_close, assert_same
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastlora import dispatch, ops, reference
from fastlora.functional import Projection, draw_seed, lora_gated_mlp

BACKENDS = ("torch", "triton")
MIXES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16+fp32": (torch.float16, torch.float32),
}
BIG = (2, 29, 61), 311, 203
SMALL = (2, 3, 13), 19, 11
"""x's shape, the MLP's width and its out features: to measure errors, and to compare bits."""
RANKS, SCALINGS = (5, 16, 3), (0.7, 2.0, -1.5)
PS, NO_DROPOUT = (0.3, 0.0, 0.5), (0.0, 0.0, 0.0)
WHO = ("gate", "up", "down")

Leaves = dict[str, Tensor]
"""x, and for each layer i: w{i}, bias{i}, a{i}, b{i}, lora_bias{i}."""


@pytest.fixture(autouse=True)
def _as_one(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However few the rows, one op; and every tensor on `device`."""
    monkeypatch.setattr(ops, "FEW_INPUTS", 0)
    monkeypatch.setattr(dispatch, "FEW_ROWS", 0)
    with torch.device(device):
        yield


def make(
    dtype: torch.dtype,
    adapter: torch.dtype,
    adapted: tuple[int, ...] = (0, 1, 2),
    sizes: tuple[tuple[int, ...], int, int] = SMALL,
) -> Leaves:
    """Unit-sized operands, so that no branch hides another's error; the layers in `adapted` have an adapter."""
    shape, inner, out = sizes
    K, t = shape[-1], {"x": torch.randn(shape).to(dtype)}
    for i, ((N, width), R) in enumerate(zip(((inner, K), (inner, K), (out, inner)), RANKS, strict=True)):
        t |= {f"w{i}": (torch.randn(N, width) * width**-0.5).to(dtype), f"bias{i}": torch.randn(N).to(dtype)}
        if i in adapted:
            t |= {f"a{i}": (torch.randn(R, width) * width**-0.5).to(adapter), f"b{i}": torch.randn(N, R).to(adapter)}
            t |= {f"lora_bias{i}": torch.randn(N).to(adapter)}
    return {name: v.requires_grad_() for name, v in t.items()}


def projections(t: Leaves, ps: tuple[float, ...]) -> list[Projection]:
    def of(i: int) -> list[Tensor | None]:
        return [t.get(f"{name}{i}") for name in ("a", "b")]

    return [
        Projection(t[f"w{i}"], t[f"bias{i}"], *of(i), SCALINGS[i], t.get(f"lora_bias{i}"), p) for i, p in enumerate(ps)
    ]


def ours(t: Leaves, activation: str, ps: tuple[float, ...] = NO_DROPOUT, backend: str | None = None) -> Tensor:
    gate, up, down = projections(t, ps)
    return lora_gated_mlp(t["x"], gate, up, down, activation, backend=backend)


def plain(t: Leaves, activation: str, masks: list[Tensor | None]) -> Tensor:
    """PEFT's formulation, layer by layer; a mask is dropout's, scaled."""

    def layer(x: Tensor, i: int) -> Tensor:
        y = F.linear(x, t[f"w{i}"], t[f"bias{i}"])
        if f"a{i}" in t:
            inner, mask = x.to(t[f"a{i}"].dtype), masks[i]
            inner = inner if mask is None else inner * mask.to(inner.dtype).view(inner.shape)
            y = y + F.linear(F.linear(inner, t[f"a{i}"]), t[f"b{i}"], t[f"lora_bias{i}"]) * SCALINGS[i]
        return y.to(x.dtype)

    return layer(ACTS[activation](layer(t["x"], 0)) * layer(t["x"], 1), 2)


def drawn(t: Leaves, ps: tuple[float, ...], backend: str, seed: int) -> list[Tensor | None]:
    """The scaled masks that `ours` draws after manual_seed(seed)."""
    torch.manual_seed(seed)
    seeds, M = draw_seed(t["x"], 3), t["x"].shape[:-1].numel()
    return [scaled_mask(seeds[i], M, t[f"w{i}"].shape[1], p, backend) if p else None for i, p in enumerate(ps)]


def grad_for(t: Leaves) -> Tensor:
    return torch.randn(*t["x"].shape[:-1], len(t["w2"])).to(t["x"].dtype)


def results(run: Callable[[Leaves], Tensor], t: Leaves, dy: Tensor) -> dict[str, Tensor]:
    y = run(t)
    grads = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(t, grads, strict=True)}


def doubled(t: Leaves) -> Leaves:
    return {name: v.detach().double().requires_grad_() for name, v in t.items()}


def hold(t: Leaves, activation: str, ps: tuple[float, ...], backend: str) -> None:
    """Three layers and an activation deep, so held as whole models are; the kernels inside are held one by one."""
    if activation == "relu":  # no rounding may decide on which side of the kink an element of gate's output lies
        with torch.no_grad():
            t["bias0"].copy_(12 * torch.sign(t["bias0"]))
    dy = grad_for(t)
    masks = drawn(t, ps, backend, 11)
    torch.manual_seed(11)
    actual = results(lambda u: ours(u, activation, ps, backend), t, dy)
    expected = results(lambda u: plain(u, activation, masks), t, dy)
    exact = results(lambda u: plain(u, activation, masks), doubled(t), dy)
    assert_all_close([(actual, expected, exact)])


CASES = [("torch", *case) for case in itertools.product(ACTS, MIXES, (NO_DROPOUT, PS))]
CASES += [("triton", "silu", mix, PS) for mix in MIXES] + [("triton", "silu", "bf16+fp32", NO_DROPOUT)]
CASES += [("triton", activation, "bf16+fp32", PS) for activation in ACTS if activation != "silu"]


@pytest.mark.parametrize(("backend", "activation", "mix", "ps"), CASES)
def test_every_output_and_gradient(backend: str, activation: str, mix: str, ps: tuple[float, ...]) -> None:
    hold(make(*MIXES[mix], sizes=BIG), activation, ps, backend)


SUBSETS = [subset for size in range(3) for subset in itertools.combinations(range(3), size)]


@pytest.mark.parametrize("adapted", SUBSETS, ids=lambda s: "+".join(WHO[i] for i in s) or "none")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_in_any_of_the_three(backend: str, adapted: tuple[int, ...]) -> None:
    ps = tuple(0.1 if i in adapted else 0.0 for i in range(3))
    hold(make(*MIXES["bf16+fp32"], adapted, BIG), "silu", ps, backend)


@pytest.mark.parametrize("activation", ACTS)
def test_gradcheck_in_float64(activation: str) -> None:
    t = make(torch.float64, torch.float64)

    def run(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours(dict(zip(t, values, strict=True)), activation, PS)

    assert torch.autograd.gradcheck(run, tuple(t.values()), fast_mode=True)


@pytest.mark.parametrize("activation", ACTS)
def test_the_twin_computes_the_same(activation: str) -> None:
    """The twin, under seeds given and drawn alike; its formulas are torch's activations in float64."""
    t = doubled(make(*MIXES["fp32"]))
    gate, up, down = projections(t, PS)
    torch.manual_seed(2)
    y = reference.lora_gated_mlp(t["x"], gate, up, down, activation)
    torch.manual_seed(2)
    again = reference.lora_gated_mlp(t["x"], gate, up, down, activation, seeds=draw_seed(t["x"], 3))
    assert_same(y, again)
    masks = drawn(t, PS, "triton", 2)  # whose masks are the twin's
    assert torch.allclose(y, plain(t, activation, masks), rtol=1e-12)


FROZEN = (
    "x",
    "x w0 bias0 a0 b0 lora_bias0 w1 bias1 a1 b1 lora_bias1",
    "a0 b1 lora_bias2",
    "x w0 w1 w2 bias0 bias1 bias2 lora_bias0 lora_bias1 lora_bias2 a0 a1 a2",
    "x w0 bias0 a0 b0 lora_bias0 w1 bias1 a1 b1 lora_bias1 w2 a2 bias2 lora_bias2",
)


@pytest.mark.parametrize("frozen", FROZEN, ids=range(len(FROZEN)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed(backend: str, frozen: str) -> None:
    """What is frozen gets no gradient, and the rest is as before, bit for bit; a trained base's gradients are right."""
    t = make(*MIXES["fp32"])
    dy = grad_for(t)
    whole = results(lambda u: ours(u, "silu", backend=backend), t, dy)
    few = {name: v.detach().requires_grad_(name not in frozen.split()) for name, v in t.items()}
    ours(few, "silu", backend=backend).backward(dy)
    for name, v in few.items():
        if name in frozen.split():
            assert v.grad is None
        else:
            assert_same(v.grad, whole[f"d{name}"])


def freeze_base(t: Leaves) -> Leaves:
    for name in t:
        if name[0] == "w" or name.startswith("bias"):
            t[name].requires_grad_(False)
    return t


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mix", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend: str, mix: str, p: float) -> None:
    """x, gate's and up's outputs, M·ΣR fp32 and a seed each: of what is as wide as the MLP, two. PEFT keeps five."""
    t = freeze_base(make(*MIXES[mix]))
    given = {v.data_ptr() for v in t.values()}
    (M, INNER), size = (t["x"].shape[:-1].numel(), len(t["w0"])), t["x"].element_size()

    def saved(run: Callable[[], Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            run()
        return list({v.data_ptr(): v for v in kept if v.data_ptr() not in given}.values())

    mine = saved(lambda: ours(t, "silu", (p,) * 3, backend))
    extra = 2 * M * INNER * size + 4 * M * sum(RANKS) + (24 if p else 0)
    assert sum(v.numel() * v.element_size() for v in mine) == extra
    assert sum(v.numel() == M * INNER for v in mine) == 2
    masks = drawn(t, (p,) * 3, "torch", 0)
    theirs = saved(lambda: plain(t, "silu", masks))
    assert sum(v.numel() == M * INNER for v in theirs) >= 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    t, runs = make(*MIXES["bf16+fp32"]), []
    dy = grad_for(t)
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(results(lambda u: ours(u, "gelu", PS, backend), t, dy))
    for name, value in runs[0].items():
        assert_same(value, runs[1][name])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_recompute_is_bit_identical(backend: str, use_reentrant: bool) -> None:
    t = make(*MIXES["bf16+fp32"])
    dy = grad_for(t)
    torch.manual_seed(7)
    want = results(lambda u: ours(u, "silu", PS, backend), t, dy)
    torch.manual_seed(7)
    y = checkpoint(lambda x: ours({**t, "x": x}, "silu", PS, backend), t["x"], use_reentrant=use_reentrant)
    y.backward(dy)
    assert_same(y, want["y"])
    for name, v in t.items():
        assert_same(v.grad, want[f"d{name}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate(backend: str) -> None:
    t = make(*MIXES["fp32"])
    dy = grad_for(t)
    once = results(lambda u: ours(u, "silu", backend=backend), t, dy)
    for _ in range(2):
        ours(t, "silu", backend=backend).backward(dy)
    for name, v in t.items():
        assert_same(v.grad, 2 * once[f"d{name}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_graph_gives_its_gradients_twice(backend: str) -> None:
    """Backward works in place in what is its own alone."""
    t = make(*MIXES["fp32"])
    y, dy = ours(t, "silu", PS, backend), grad_for(t)
    first = torch.autograd.grad(y, list(t.values()), dy, retain_graph=True)
    for left, right in zip(first, torch.autograd.grad(y, list(t.values()), dy), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("ps", [NO_DROPOUT, PS])
@pytest.mark.parametrize("activation", ACTS)
def test_many_gradients_at_once(activation: str, ps: tuple[float, ...]) -> None:
    """As a vectorised jacobian asks for them: one backward, whose dy stands for all."""
    t = doubled(make(*MIXES["fp32"], sizes=BIG))
    y, dys = ours(t, activation, ps, "torch"), torch.stack([grad_for(t) for _ in range(3)])
    one = [torch.autograd.grad(y, t["x"], dy, retain_graph=True)[0] for dy in dys]
    (there,) = torch.autograd.grad(y, t["x"], dys, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(there, torch.stack(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_raises(backend: str) -> None:
    t = make(*MIXES["fp32"])
    (dx,) = torch.autograd.grad(ours(t, "silu", backend=backend).sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x_and_weights_and_keeps_fp32_adapters(backend: str, device: str) -> None:
    t = make(*MIXES["fp32"], sizes=BIG)
    dy = grad_for(t)
    base = ("x", "w0", "w1", "w2", "bias0", "bias1", "bias2")
    rounded = {n: (v.detach().bfloat16() if n in base else v.detach()).double().requires_grad_() for n, v in t.items()}
    found = []
    for run in (lambda u: ours(u, "silu", backend=backend), lambda u: plain(u, "silu", [None] * 3)):
        with torch.autocast(device, torch.bfloat16):
            y = run(t)
        grads = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
        found.append({"y": y.bfloat16()} | {f"d{name}": g for name, g in zip(t, grads, strict=True)})
    exact = results(lambda u: plain(u, "silu", [None] * 3), rounded, dy)
    assert all(value.dtype == torch.float32 for name, value in found[0].items() if name != "y")
    assert_all_close([(found[0], found[1], exact)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty_batches(backend: str) -> None:
    t = make(*MIXES["fp32"])
    strided = {**t, "x": torch.randn(13, 3, 2).permute(2, 1, 0), "w2": t["w2"].detach().t().contiguous().t()}
    strided = {name: v.detach().requires_grad_() for name, v in strided.items()}
    one = torch.ones(()).expand(2, 3, 11)  # what .sum() sends back
    actual = results(lambda u: ours(u, "silu", backend=backend), strided, one)
    expected = results(lambda u: plain(u, "silu", [None] * 3), strided, one)
    exact = results(lambda u: plain(u, "silu", [None] * 3), doubled(strided), one)
    assert_all_close([(actual, expected, exact)])
    nothing = {**t, "x": torch.empty(3, 0, 13, requires_grad=True)}
    for name, value in results(lambda u: ours(u, "silu", PS, backend), nothing, torch.empty(3, 0, 11)).items():
        assert value.shape == (nothing[name[1:]].shape if name != "y" else (3, 0, 11)) and not value.any()


def flat(t: Leaves) -> list[list[Tensor]]:
    absent = torch.empty(0)
    return [[t.get(f"{name}{i}", absent) for i in range(3)] for name in ("w", "bias", "a", "b", "lora_bias")]


@pytest.mark.parametrize(("backend", "adapted"), [("torch", (0, 1, 2)), ("torch", (1,)), ("triton", (1, 2))])
def test_opcheck(backend: str, adapted: tuple[int, ...]) -> None:
    t = make(*MIXES["fp32"], adapted)
    seeds = draw_seed(t["x"], 3)
    numbers = seeds, list(SCALINGS), [0.25, 0.0, 0.5], "gelu_tanh"
    inputs = (t["x"], *flat(t), *numbers, backend)
    torch.library.opcheck(torch.ops.fastlora.lora_gated, inputs)
    y, *kept = (v.detach() for v in torch.ops.fastlora.lora_gated(*inputs))
    ws, _, as_, bs, _ = ([v.detach() for v in tensors] for tensors in flat(t))
    g, u, h, h_down = kept
    wants = True, [i in adapted for i in range(3)], [i in adapted for i in range(3)], True, True
    backward = (torch.randn_like(y), t["x"].detach(), g, u, ws, as_, bs, h, h_down, *numbers, *wants, backend)
    torch.library.opcheck(torch.ops.fastlora.lora_gated_backward, backward)


@pytest.mark.parametrize(("backend", "ps"), [("torch", NO_DROPOUT), ("torch", PS), ("triton", PS)])
def test_one_graph_without_breaks(backend: str, ps: tuple[float, ...]) -> None:
    t = make(*MIXES["fp32"])
    dy = grad_for(t)
    compiled = torch.compile(lambda u: ours(u, "silu", ps, backend), backend="aot_eager", fullgraph=True)
    found = []
    for run in (compiled, lambda u: ours(u, "silu", ps, backend)):
        torch.manual_seed(6)
        found.append(results(run, t, dy))
    for name, value in found[0].items():
        assert_same(value, found[1][name])


def test_few_rows_run_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where calls cost more than arithmetic; the values are PEFT's all the same."""
    monkeypatch.undo()
    t = make(*MIXES["fp32"])
    assert "LoRAGated" not in type(ours(t, "relu2", backend="torch").grad_fn).__name__
    hold(t, "relu2", NO_DROPOUT, "torch")


def test_bad_input_names_the_layer() -> None:
    t = make(*MIXES["fp32"])
    gate, up, down = projections(t, NO_DROPOUT)
    with pytest.raises(ValueError, match="activation: got 'swish', wanted one of"):
        lora_gated_mlp(t["x"], gate, up, down, "swish")
    with pytest.raises(TypeError, match=r"up: got tuple, wanted a fastlora\.functional\.Projection"):
        lora_gated_mlp(t["x"], gate, tuple(up), down, "silu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gate: lora_A: got shape \(5, 12\)"):
        lora_gated_mlp(t["x"], gate._replace(lora_A=gate.lora_A[:, :12]), up, down, "silu")  # type: ignore[index]
    with pytest.raises(ValueError, match=r"up: weight: got shape .*the shape of gate's"):
        lora_gated_mlp(t["x"], gate, Projection(torch.randn(7, 13)), down, "silu")
    with pytest.raises(ValueError, match=r"down: x: got shape \(0, 19\), wanted \[..., 13\]"):
        lora_gated_mlp(t["x"], gate, up, gate, "silu")
    with pytest.raises(ValueError, match=r"down: dropout_p: got 1.0"):
        lora_gated_mlp(t["x"], gate, up, down._replace(dropout_p=1.0), "silu")
