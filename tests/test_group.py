"""Layers that share an input: every output and gradient, the op's own face, and what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from operands import scaled_mask
from tolerance import assert_close, assert_same
from torch import Tensor

from fastlora import dispatch, ops, reference
from fastlora.functional import draw_seed, lora_linear, lora_linear_group

BACKENDS = ("torch", "triton")
MIXES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16+fp32": (torch.float16, torch.float32),
}
SHAPE = 2, 29, 61
NS, RANKS, SCALINGS = (155, 117, 233), (5, 16, 1), (0.7, 2.0, -1.5)
PS = (0.3, 0.0, 0.5)
SMALL: dict[str, Any] = {"shape": (1, 7, 16), "sizes": ((9, 16, 5), (2, 4, 1))}
"""Where what is tested is not the arithmetic: an interpreted launch costs by its tiles."""

Group = dict[str, Tensor]
"""x, and for each member i: w{i}, bias{i}, a{i}, b{i}, lora_bias{i}."""


@pytest.fixture(autouse=True)
def _grouped(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However few the rows, a group; and every tensor on `device`."""
    monkeypatch.setattr(ops, "FEW_INPUTS", 0)
    monkeypatch.setattr(dispatch, "FEW_ROWS", 0)
    with torch.device(device):
        yield


def make(
    dtype: torch.dtype,
    adapter: torch.dtype,
    without: tuple[int, ...] = (),
    shape: tuple[int, ...] = SHAPE,
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = (NS, RANKS),
) -> Group:
    """A group of three; the members in `without` have no adapter."""
    K, t = shape[-1], {"x": torch.randn(shape).to(dtype)}
    for i, (N, R) in enumerate(zip(*sizes, strict=True)):
        t |= {f"w{i}": torch.randn(N, K).to(dtype), f"bias{i}": torch.randn(N).to(dtype)}
        if i not in without:
            t |= {f"a{i}": torch.randn(R, K).to(adapter), f"b{i}": torch.randn(N, R).to(adapter)}
            t |= {f"lora_bias{i}": torch.randn(N).to(adapter)}
    return {name: v.requires_grad_() for name, v in t.items()}


def lists(t: Group) -> list[list[Tensor | None]]:
    return [[t.get(f"{name}{i}") for i in range(3)] for name in ("w", "bias", "a", "b", "lora_bias")]


def ours(t: Group, ps: tuple[float, ...] = (0.0,) * 3, backend: str | None = None) -> tuple[Tensor, ...]:
    ws, biases, as_, bs, lora_biases = lists(t)
    return lora_linear_group(
        t["x"], ws, biases, as_, bs, SCALINGS, dropout_p=ps, lora_biases=lora_biases, backend=backend
    )  # type: ignore[arg-type]


def plain(t: Group, masks: list[Tensor | None]) -> tuple[Tensor, ...]:
    """PEFT's formulation, layer by layer; a mask is dropout's, scaled."""
    linear, ys = torch.nn.functional.linear, []
    for i, mask in enumerate(masks):
        y = linear(t["x"], t[f"w{i}"], t[f"bias{i}"])
        if f"a{i}" in t:
            inner = t["x"].to(t[f"a{i}"].dtype)
            inner = inner if mask is None else inner * mask.to(inner.dtype)
            y = y + linear(linear(inner, t[f"a{i}"]), t[f"b{i}"], t[f"lora_bias{i}"]) * SCALINGS[i]
        ys.append(y.to(t["x"].dtype))
    return tuple(ys)


def drawn(x: Tensor, ps: tuple[float, ...], backend: str, seed: int) -> list[Tensor | None]:
    """The scaled masks that `ours` draws after manual_seed(seed)."""
    torch.manual_seed(seed)
    seeds, M, K = draw_seed(x, 3), x.numel() // x.shape[-1], x.shape[-1]
    return [scaled_mask(seeds[i], M, K, p, backend).view(x.shape) if p else None for i, p in enumerate(ps)]


def results(run: Callable[[Group], tuple[Tensor, ...]], t: Group, dys: list[Tensor]) -> dict[str, Tensor]:
    ys = run(t)
    grads = torch.autograd.grad(ys, list(t.values()), [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"d{name}": g for name, g in zip(t, grads, strict=True)}


def doubled(t: Group) -> Group:
    return {name: v.detach().double().requires_grad_() for name, v in t.items()}


@pytest.mark.parametrize("without", [(), (1,)], ids=["all", "one-plain"])
@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), PS], ids=["p0", "dropout"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_and_gradient(backend: str, mix: str, ps: tuple[float, ...], without: tuple[int, ...]) -> None:
    """On torch eight groups as one: a small one's gradients err a quarter too much in one draw of ten, by chance."""
    kinds: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(11, 12 if backend == "triton" else 19):
        t = make(*MIXES[mix], without)
        dys = [torch.randn(*SHAPE[:-1], N).to(t["x"].dtype) for N in NS]
        masks = drawn(t["x"], ps, backend, seed) if any(ps) else [None] * 3
        torch.manual_seed(seed)
        actual = results(lambda u: ours(u, ps, backend), t, dys)
        peft = partial(plain, masks=masks)
        expected, exact = results(peft, t, dys), results(peft, doubled(t), dys)
        for name, value in actual.items():
            assert value.dtype == expected[name].dtype
            kinds.setdefault(name, []).append((value, expected[name], exact[name]))
    for name, found in kinds.items():
        assert_close(*(torch.cat(side) for side in zip(*found, strict=True)), f"{name} {backend} {mix} p={ps}")


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), PS], ids=["p0", "dropout"])
def test_gradcheck_in_float64(ps: tuple[float, ...]) -> None:
    t = make(torch.float64, torch.float64, shape=(2, 3, 9), sizes=((5, 3, 4), (2, 8, 1)))

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return ours(dict(zip(t, values, strict=True)), ps)

    assert torch.autograd.gradcheck(run, tuple(t.values()))


def test_the_twin_draws_the_same_masks() -> None:
    """`reference.lora_linear_group` after the same manual_seed, or the seeds said; the kernels' bits are its own."""

    def twin(t: Group, seeds: Tensor | None) -> tuple[Tensor, ...]:
        ws, biases, as_, bs, lora_biases = lists(t)
        return reference.lora_linear_group(
            t["x"], ws, biases, as_, bs, SCALINGS, dropout_p=PS, lora_biases=lora_biases, seeds=seeds
        )  # type: ignore[arg-type]

    t, runs = make(torch.float32, torch.float32, (2,)), []
    for run in (lambda: twin(t, None), lambda: twin(t, draw_seed(t["x"], 3)), lambda: ours(t, PS, "triton")):
        torch.manual_seed(2)
        runs.append(run())
    torch.manual_seed(2)
    exact = twin(doubled(t), draw_seed(t["x"], 3))
    for drawn_, said, kernels, wide in zip(*runs, exact, strict=True):
        assert_same(drawn_, said)
        assert_close(kernels, said, wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unused", [(0,), (1, 2)])
def test_an_output_that_nobody_used(backend: str, unused: tuple[int, ...]) -> None:
    """It adds nothing to dx; its factors' gradients are none or zero."""
    t = make(torch.float32, torch.float32)
    used = [i for i in range(3) if i not in unused]
    dys = [torch.randn(*SHAPE[:-1], N) for N in NS]
    same, exact = {name: v.detach().clone().requires_grad_() for name, v in t.items()}, doubled(t)
    for inputs, ys in (
        (t, ours(t, backend=backend)),
        (same, plain(same, [None] * 3)),
        (exact, plain(exact, [None] * 3)),
    ):
        torch.autograd.backward([ys[i] for i in used], [dys[i].to(inputs["x"].dtype) for i in used])
    for name, v in t.items():
        if name[-1].isdigit() and int(name[-1]) in unused:
            assert v.grad is None or not v.grad.any(), name
        else:
            assert_close(*(inputs[name].grad for inputs in (t, same, exact)), name)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["x", "a0", "b1", "x a0 a1 a2 w0 w1 w2", "x w2 bias2 a2 b2 lora_bias2"])
def test_only_what_is_needed(backend: str, frozen: str) -> None:
    """What is frozen gets no gradient, and the rest is as before, bit for bit."""
    t = make(torch.float32, torch.float32)
    dys = [torch.randn(*SHAPE[:-1], N) for N in NS]
    ys = ours(t, backend=backend)
    whole = dict(zip(t, torch.autograd.grad(ys, list(t.values()), dys), strict=True))
    few = {name: v.detach().requires_grad_(name not in frozen.split()) for name, v in t.items()}
    ys = ours(few, backend=backend)
    assert [y.requires_grad for y in ys] == [True, True, not frozen.startswith("x w2")]
    live = [i for i in range(3) if ys[i].requires_grad]
    torch.autograd.backward([ys[i] for i in live], [dys[i] for i in live])
    for name, v in few.items():
        if name in frozen.split():
            assert v.grad is None
        elif name != "x":
            assert_same(v.grad, whole[name])


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mix", ["fp32", "bf16+fp32"])
def test_what_is_saved(mix: str, p: float) -> None:
    """x, the weights, the factors, M·ΣR fp32 and a seed each; nothing of x's or y's size beside x."""
    t = make(*MIXES[mix])
    for name in t:
        if name[0] in "w" or name.startswith("bias"):
            t[name].requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        ours(t, (p,) * 3, "torch")
    given = {v.data_ptr() for v in t.values()}
    extra = sum(v.numel() * v.element_size() for v in saved if v.data_ptr() not in given)
    M = t["x"].numel() // SHAPE[-1]
    assert extra == 4 * M * sum(RANKS) + (24 if p else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bit_for_bit(backend: str) -> None:
    t = make(torch.bfloat16, torch.float32)
    dys, runs = [torch.randn(*SHAPE[:-1], N) for N in NS], []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(results(lambda u: ours(u, PS, backend), t, dys))
    for name, value in runs[0].items():
        assert_same(value, runs[1][name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    t = make(torch.float32, torch.float32, (1,), **SMALL)
    absent = torch.empty(0)
    tensors = [[absent if v is None else v for v in members] for members in lists(t)]
    inputs = (t["x"], *tensors, draw_seed(t["x"], 3), list(SCALINGS), [0.25, 0.0, 0.5], backend)
    torch.library.opcheck(torch.ops.fastlora.lora_group, inputs)
    ys, h = (v for v in torch.ops.fastlora.lora_group(*inputs))
    ws, _, as_, bs, _ = ([v.detach() for v in members] for members in tensors)
    dys = [torch.randn_like(y) for y in ys]
    backward = (
        dys, t["x"].detach(), ws, as_, bs, h.detach(), inputs[6], list(SCALINGS), [0.25, 0.0, 0.5],
        True, [True, False, True], [True, False, False], backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastlora.lora_group_backward, backward)


@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), PS], ids=["p0", "dropout"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_without_breaks(backend: str, ps: tuple[float, ...]) -> None:
    t = make(torch.float32, torch.float32, **SMALL)
    dys = [torch.randn(1, 7, N) for N in (9, 16, 5)]
    compiled = torch.compile(lambda u: ours(u, ps, backend), backend="aot_eager", fullgraph=True)
    found = []
    for run in (compiled, lambda u: ours(u, ps, backend)):
        torch.manual_seed(6)
        found.append(results(run, t, dys))
    for name, value in found[0].items():
        assert_same(value, found[1][name])


def test_a_second_derivative_raises() -> None:
    t = make(torch.float32, torch.float32)
    (dx,) = torch.autograd.grad(ours(t, backend="torch")[0].sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def test_few_rows_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    t = make(torch.float32, torch.float32)
    one = lora_linear(
        t["x"], t["w0"], t["bias0"], t["a0"], t["b0"], SCALINGS[0], lora_bias=t["lora_bias0"], backend="torch"
    )
    assert_same(ours(t, backend="torch")[0], one)


@pytest.mark.parametrize("few", [0, 10**9], ids=["together", "one by one"])
def test_a_plain_member_takes_a_bias_of_any_dtype(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a layer with an adapter does, and however many rows there are."""
    monkeypatch.setattr(ops, "FEW_INPUTS", few)
    t = make(torch.bfloat16, torch.float32, without=(1,))
    bias = t["bias1"].detach().float().requires_grad_()
    dy = torch.randn(*SHAPE[:-1], NS[1]).bfloat16()
    runs = []
    for given in (t["bias1"], bias):
        y = ours({**t, "bias1": given}, backend="torch")[1]
        runs.append((y, torch.autograd.grad(y, given, dy)[0]))
    assert_same(runs[1][0], runs[0][0])
    assert_close(runs[1][1], runs[0][1], dy.double().sum((0, 1)))


def test_more_members_than_a_launch_takes() -> None:
    t = make(torch.float32, torch.float32)
    ws, biases, as_, bs, _ = lists(t)
    ys = lora_linear_group(t["x"], ws * 2, biases * 2, as_ * 2, bs * 2, SCALINGS * 2)  # type: ignore[arg-type]
    for y, z in zip(ys[:3], ys[3:], strict=True):
        assert_same(y, z)


def test_bad_input_names_the_member() -> None:
    t = make(torch.float32, torch.float32)
    ws, biases, as_, bs, _ = lists(t)
    with pytest.raises(ValueError, match=r"biases: got 2 entries, wanted 3"):
        lora_linear_group(t["x"], ws, biases[:2], as_, bs, SCALINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"member 1: lora_A: got shape \(16, 60\)"):
        lora_linear_group(t["x"], ws, biases, [as_[0], as_[1][:, :60], as_[2]], bs, SCALINGS)  # type: ignore
    with pytest.raises(ValueError, match="member 2: lora_A and lora_B: got one of them"):
        lora_linear_group(t["x"], ws, biases, [*as_[:2], None], bs, SCALINGS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"member 0: dropout_p: got 1.0"):
        lora_linear_group(t["x"], ws, biases, as_, bs, SCALINGS, dropout_p=[1.0, 0, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"member 0: weight|member 0: x: got shape"):
        lora_linear_group(t["x"][..., :60], ws, biases, as_, bs, SCALINGS)  # type: ignore[arg-type]
