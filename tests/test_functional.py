"""The functional face: values, every gradient, and what torch expects of an op, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from operands import scaled_mask
from tolerance import assert_close, assert_same
from torch import Tensor

from fastlora import functional, reference
from fastlora.eager import base
from fastlora.functional import draw_seed, lora_linear, lora_update

BACKENDS = ("torch", "triton")
MIXES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")


@pytest.fixture(autouse=True)
def _on_device(device: str) -> Iterator[None]:
    """Every tensor these tests make lies on `device`: interpreted on a CPU, compiled on a GPU."""
    with torch.device(device):
        yield


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, lora_bias: Tensor, mask: Tensor | None
) -> Tensor:
    """PEFT's formulation in the parameters' own dtypes; `mask` is dropout's, scaled."""
    linear = torch.nn.functional.linear
    inner = x.to(lora_A.dtype)
    if mask is not None:
        inner = inner * mask.to(inner.dtype)
    update = linear(linear(inner, lora_A), lora_B, lora_bias)
    return (linear(x, weight, bias) + update * 0.7).to(x.dtype)


def make(
    dtype: torch.dtype, adapter: torch.dtype, M: tuple[int, ...] = (3, 29), K: int = 61, N: int = 55, R: int = 5
) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(*M, K).to(dtype),
        "weight": torch.randn(N, K).to(dtype),
        "bias": torch.randn(N).to(dtype),
        "lora_A": torch.randn(R, K).to(adapter),
        "lora_B": torch.randn(N, R).to(adapter),
        "lora_bias": torch.randn(N).to(adapter),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def ours(t: dict[str, Tensor], p: float = 0.0, backend: str | None = None, scaling: float | Tensor = 0.7) -> Tensor:
    return lora_linear(
        t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], scaling,
        dropout_p=p, lora_bias=t["lora_bias"], backend=backend,
    )  # fmt: skip


def outputs(run: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    y = run(t)
    grads = torch.autograd.grad(y, [t[name] for name in NAMES], dy.to(y.dtype))
    return {"y": y.detach(), **{"d" + name: g for name, g in zip(NAMES, grads, strict=True)}}


def dropped_mask(t: dict[str, Tensor], p: float, backend: str, seed: int) -> Tensor | None:
    """The scaled mask that `ours` will draw after manual_seed(seed)."""
    if p == 0:
        return None
    torch.manual_seed(seed)
    drawn = draw_seed(t["x"])
    M, K = t["x"].numel() // t["x"].shape[-1], t["x"].shape[-1]
    return scaled_mask(drawn, M, K, p, backend).view(t["x"].shape)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("backend", "M", "matmul"),
    [*((("torch", M, matmul)) for M in ((3, 29), (3, 360)) for matmul in (True, False)), ("triton", (3, 29), True)],
)
def test_output_and_every_gradient(
    backend: str, M: tuple[int, ...], matmul: bool, mix: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch of few elements, which run by fewer calls, and of many; on a CPU that multiplies 16 bits and one not.

    Four draws on torch, held as one: of a single one da's 305 sums err by 1.03 ± 0.08 of plain torch's error.
    """
    monkeypatch.setattr(base, "has_matmul", lambda dtype: matmul or dtype.itemsize > 2)
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed in range(4 if backend == "torch" else 1):
        t = make(*MIXES[mix], M=M)
        dy = torch.randn(*t["x"].shape[:-1], 55).to(t["x"].dtype)
        mask = dropped_mask(t, p, backend, seed)
        torch.manual_seed(seed)
        sides[0].append(outputs(lambda u: ours(u, p, backend), t, dy))
        sides[1].append(outputs(lambda u: plain_linear(*u.values(), mask), t, dy))  # noqa: B023
        wide = {name: v.detach().double().requires_grad_() for name, v in t.items()}
        sides[2].append(outputs(lambda u: plain_linear(*u.values(), mask), wide, dy))  # noqa: B023
    for name in sides[0][0]:
        actual, plain, exact = (torch.cat([found[name].view(-1) for found in side]) for side in sides)
        assert actual.dtype == plain.dtype
        assert_close(actual, plain, exact, f"{name} {backend} {mix} p={p}")


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_in_float64(p: float) -> None:
    t = make(torch.float64, torch.float64, M=(2, 3), K=9, N=7, R=2)

    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours(dict(zip(NAMES, tensors, strict=True)), p)

    assert torch.autograd.gradcheck(run, tuple(t.values()))
    y = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, lora_bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_update(y, x, a, b, 0.7, dropout_p=p, lora_bias=lora_bias)

    assert torch.autograd.gradcheck(update, (y, t["x"], t["lora_A"], t["lora_B"], t["lora_bias"]))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("mix", ["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize(("backend", "M"), [("torch", (3, 29)), ("torch", (3, 360)), ("triton", (3, 29))])
def test_update_is_the_layer_without_its_base(backend: str, M: tuple[int, ...], mix: str, p: float) -> None:
    t = make(*MIXES[mix], M=M)
    mask = dropped_mask(t, p, backend, seed=5)
    y = torch.randn(*M, 55).to(t["x"].dtype).requires_grad_()
    dy = torch.randn_like(y)
    adapter = [t[name] for name in ("lora_A", "lora_B", "lora_bias")]

    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, lora_bias: Tensor) -> Tensor:
        inner = x.to(a.dtype) if mask is None else x.to(a.dtype) * mask.to(a.dtype)
        linear = torch.nn.functional.linear
        return (y + linear(linear(inner, a), b, lora_bias) * 0.7).to(y.dtype)

    def run(layer: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out = layer(*inputs)
        return [out, *torch.autograd.grad(out, inputs, dy.to(out.dtype))]

    def fused(y: Tensor, x: Tensor, a: Tensor, b: Tensor, lora_bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        return lora_update(y, x, a, b, 0.7, dropout_p=p, lora_bias=lora_bias, backend=backend)

    inputs = [y, t["x"], *adapter]
    exact = run(plain, [v.detach().double().requires_grad_() for v in inputs])
    for name, *values in zip(("y", "dy", "dx", "da", "db", "dbias"), run(fused, inputs), run(plain, inputs), exact,
                             strict=True):  # fmt: skip
        assert_close(*values, f"{name} {backend} {mix} p={p}")


@pytest.mark.parametrize("M", [2, 1100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_keeps_the_bits_of_a_wider_base_output(backend: str, M: int) -> None:
    """A base of 16 bits that answers in fp32: only the low-rank term is of 16 bits."""
    t = make(torch.bfloat16, torch.bfloat16, M=(M,), K=128)
    x, a, b = (t[name].detach() for name in ("x", "lora_A", "lora_B"))
    y = torch.randn(M, 55)
    out, update = (lora_update(base, x, a, b, 0.7, backend=backend) for base in (y, torch.zeros_like(y)))
    torch.testing.assert_close(out - update, y, rtol=0, atol=1e-6 * float(update.abs().max()))


@pytest.mark.parametrize("jobs", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_output_sends_back_what_16_bits_do_not_hold(backend: str, jobs: bool) -> None:
    """To fp32 adapters over a base that takes fp16 and answers in fp32, as plain torch does; x's gradient has x's."""
    t = make(torch.float16, torch.float32, M=(40,))
    y, dy = torch.randn(40, 55, requires_grad=True), torch.randn(40, 55) * 2.0**-30
    inputs = [y, *(t[name] for name in ("x", "lora_A", "lora_B"))]

    def fused(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if jobs:
            return functional.jobs_update(y, x, [a], [b], [0.7], [0], backend=backend)
        return lora_update(y, x, a, b, 0.7, backend=backend)

    def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + x.to(a.dtype) @ a.t() @ b.t() * 0.7

    mine, theirs = (torch.autograd.grad(run(*inputs), inputs, dy) for run in (fused, plain))
    exact = [v.detach().double().requires_grad_() for v in inputs]
    wanted = torch.autograd.grad(plain(*exact), exact, dy.double())
    for name, *values in zip(("y", "x", "a", "b"), mine, theirs, wanted, strict=True):
        assert values[0].dtype == values[1].dtype
        assert_close(*values, f"d{name} {backend}")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_needs_input_grad_is_obeyed(backend: str, p: float) -> None:
    """No dx in a first layer, no da when A is frozen, no db when B is: the backward op is asked for the rest only."""
    asked: list[tuple[bool, ...]] = []

    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if func is torch.ops.fastlora.lora_backward.default:
                asked.append(tuple(args[-4:-1]))
            return func(*args, **(kwargs or {}))  # type: ignore[operator]

    for wanted in ({"x"}, {"lora_A"}, {"lora_B"}, {"lora_A", "lora_B"}, {"weight"}, {"lora_bias"}):
        t = {name: v.detach().requires_grad_(name in wanted) for name, v in make(torch.bfloat16, torch.float32).items()}
        full = make(torch.bfloat16, torch.float32)
        full = {name: t[name].detach().requires_grad_() for name in full}
        dy = torch.randn(3, 29, 55).bfloat16()
        torch.manual_seed(3)
        want = outputs(lambda u: ours(u, p, backend), full, dy)
        asked.clear()
        torch.manual_seed(3)
        with Watch():
            ours(t, p, backend).backward(dy)
        expected = tuple(name in wanted for name in ("x", "lora_A", "lora_B"))
        assert asked == ([expected] if any(expected) else [])
        for name in NAMES:
            assert (t[name].grad is not None) == (name in wanted)
            if name in wanted:
                assert_same(t[name].grad, want["d" + name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_stride_zero_and_transposed_inputs(backend: str) -> None:
    t = make(torch.float32, torch.float32)
    strided = {**t, "x": torch.randn(61, 29, 3).permute(2, 1, 0), "weight": t["weight"].detach().t().contiguous().t()}
    strided = {name: v.detach().requires_grad_() for name, v in strided.items()}
    exact = {name: v.detach().double().requires_grad_() for name, v in strided.items()}
    one = torch.ones(()).expand(3, 29, 55)  # what .sum() sends back
    usual, wanted = (outputs(lambda u: plain_linear(*u.values(), None), t, one) for t in (strided, exact))
    for name, actual in outputs(lambda u: ours(u, 0.0, backend), strided, one).items():
        assert_close(actual, usual[name], wanted[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_numbers_keep_their_sign(backend: str) -> None:
    """z.conj().imag is real, and negated by a bit alone, as the gradient of a complex key's imaginary part is."""
    t, dy = make(torch.float32, torch.float32), torch.randn(3, 29, 55)
    expected = outputs(lambda u: ours(u, 0.0, backend), t, dy)
    negated = {**t, "x": torch._neg_view(-t["x"].detach()).requires_grad_()}
    assert negated["x"].is_neg()
    for name, actual in outputs(lambda u: ours(u, 0.0, backend), negated, torch._neg_view(-dy)).items():
        assert_same(actual, expected[name])
    query, sides = torch.randn(55, 7, dtype=torch.complex64), []
    for each in (backend, "torch"):
        key = torch.complex(torch.zeros(()), ours(t, 0.0, each))
        sides.append(torch.autograd.grad((key.conj() @ query).real.sum(), [t["x"], t["lora_A"], t["lora_B"]]))
    for actual, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_many_gradients_at_once_on_the_kernels() -> None:
    """is_grads_batched, as of a vectorized jacobian: torch's rule runs, since a kernel reads one tensor; not with masks
    that interpreted kernels alone make."""
    t = make(torch.float32, torch.float32, M=(29,), N=61, K=61)
    x, w, a, b = (t[name] for name in ("x", "weight", "lora_A", "lora_B"))

    def every(backend: str, p: float = 0.0) -> dict[str, Tensor]:
        options = {"dropout_p": p, "backend": backend}
        layers = [functional.Projection(w, None, a, b, 0.7, None, p)] * 3
        pair = functional.lora_linear_group(x, [w, w], [None, None], [a, a], [b, b], [0.7, 0.5], **options)
        return {
            "linear": lora_linear(x, w, None, a, b, 0.7, **options),
            "update": lora_update(x.detach(), x, a, b, 0.7, **options),
            "group": torch.cat(pair, -1),
            "gated": functional.lora_gated_mlp(x, *layers, "silu", backend=backend),
        }

    expected, actual = every("torch"), every("triton")
    for name, y in actual.items():
        dys = torch.randn(3, *y.shape)
        for mine, theirs in zip(
            torch.autograd.grad(y, [x, a, b], dys, is_grads_batched=True),
            torch.autograd.grad(expected[name], [x, a, b], dys, is_grads_batched=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    for y in every("triton", 0.5).values():
        with pytest.raises(RuntimeError, match="dropout of interpreted kernels"):
            torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 7)])
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    t = make(torch.float32, torch.float32, M=shape)
    y = ours(t, 0.2, backend)
    assert y.shape == (*shape, 55)
    y.sum().backward()
    for name in NAMES:
        grad = t[name].grad
        assert grad is not None and grad.shape == t[name].shape and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "N"), [(0, 55), (61, 0)])
@pytest.mark.parametrize("shape", [(), (3, 29), (2, 0)])
def test_no_features(backend: str, K: int, N: int, shape: tuple[int, ...]) -> None:
    """As torch.nn.Linear, of any number of dimensions: no in features give the biases, no out features nothing."""
    t = make(torch.float32, torch.float32, M=shape, K=K, N=N)
    y = ours(t, 0.2, backend)
    y.sum().backward()
    with torch.no_grad():
        wanted = (t["bias"] + 0.7 * t["lora_bias"]).expand(*shape, N)
        for value in (y, reference.lora_linear(*list(t.values())[:5], 0.7, lora_bias=t["lora_bias"])):
            torch.testing.assert_close(value, wanted)
    for name in NAMES:
        grad = t[name].grad
        assert grad is not None and grad.shape == t[name].shape


def test_one_vector_without_leading_dimensions() -> None:
    t = make(torch.float32, torch.float32, M=())
    assert ours(t).shape == (55,)
    assert_same(ours(t), ours({**t, "x": t["x"][None]})[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_makes_dropout_repeatable_and_eval_has_none(backend: str, device: str) -> None:
    t = make(torch.float32, torch.float32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(outputs(lambda u: ours(u, 0.3, backend), t, torch.ones(3, 29, 55)))
    for name in runs[0]:
        assert_same(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0]["y"], runs[2]["y"])
    generator = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    state = generator()
    off = lora_linear(t["x"], t["weight"], None, t["lora_A"], t["lora_B"], 1.0, dropout_p=0.3, training=False)
    assert_same(generator(), state)
    assert_same(off, lora_linear(t["x"], t["weight"], None, t["lora_A"], t["lora_B"], 1.0))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_recompute_is_bit_identical(backend: str, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    t = make(torch.bfloat16, torch.float32)
    dy = torch.randn(3, 29, 55).bfloat16()
    torch.manual_seed(7)
    want = outputs(lambda u: ours(u, 0.3, backend), t, dy)
    torch.manual_seed(7)
    y = checkpoint(lambda x: ours({**t, "x": x}, 0.3, backend), t["x"], use_reentrant=use_reentrant)
    y.backward(dy)
    assert_same(y, want["y"])
    for name in NAMES:
        assert_same(t[name].grad, want["d" + name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises_clearly(backend: str) -> None:
    t = make(torch.float32, torch.float32)
    (dx,) = torch.autograd.grad(ours(t, 0.0, backend).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


def test_torch_func_is_refused_clearly_and_taken_by_the_reference() -> None:
    def loss(op: Callable[..., Tensor], a: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        weight, bias, b = rest
        return op(x, weight, bias, a, b, 0.5, training=False).square().sum()

    shapes = ((3, 8), (5, 8), (12, 8), (12,), (12, 3))
    a, x, *rest = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    over_rows = (None, 0, None, None, None)
    for transformed in (partial(torch.func.vmap, in_dims=over_rows), torch.func.grad):
        with pytest.raises(RuntimeError, match=r"torch\.func .* do not see through the fused ops"):
            transformed(partial(loss, lora_linear))(a, x, *rest)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode AD"):
        loss(lora_linear, a, torch.autograd.forward_ad.make_dual(x, x), *rest)
    by_row = torch.func.vmap(torch.func.grad(partial(loss, reference.lora_linear)), over_rows)(a, x, *rest)
    a.requires_grad_()
    for grad, row in zip(by_row, x, strict=True):
        torch.testing.assert_close(grad, *torch.autograd.grad(loss(reference.lora_linear, a, row, *rest), a))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_in_a_tensor(backend: str) -> None:
    """PEFT's compiled hotswap keeps scaling in a 0-d tensor: same values, no recompile, and it may even train."""
    t = make(torch.float32, torch.float32)
    held = torch.tensor(0.7, requires_grad=True)
    dy = torch.randn(3, 29, 55)
    want = outputs(lambda u: ours(u, 0.0, backend), t, dy)
    got = outputs(lambda u: ours(u, 0.0, backend, held), t, dy)
    exact_inputs = {name: v.detach().double().requires_grad_() for name, v in t.items()}
    exact = outputs(lambda u: plain_linear(*u.values(), None), exact_inputs, dy)
    for name in want:
        assert_close(got[name], want[name], exact[name], name)
    (slope,) = torch.autograd.grad(ours(t, 0.0, backend, held), held, dy)
    update = (want["y"] - torch.nn.functional.linear(t["x"], t["weight"], t["bias"])).detach().double() / 0.7
    assert float(slope) == pytest.approx(float((update * dy).sum()), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x_and_weight_and_keeps_fp32_adapters(backend: str, device: str) -> None:
    t = make(torch.float32, torch.float32)
    dy = torch.randn(3, 29, 55).bfloat16()
    half = {
        n: (v.detach().bfloat16() if n in ("x", "weight", "bias") else v.detach()).requires_grad_()
        for n, v in t.items()
    }

    def plain(u: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return plain_linear(*u.values(), None).to(torch.bfloat16)

    with torch.autocast(device, torch.bfloat16):
        y = ours(t, 0.0, backend)
        grads = torch.autograd.grad(y, [t[name] for name in NAMES], dy)
    assert y.dtype == torch.bfloat16
    reference_plain = outputs(plain, t, dy)
    exact_inputs = {name: v.detach().double().requires_grad_() for name, v in half.items()}
    exact = outputs(lambda u: plain_linear(*u.values(), None), exact_inputs, dy)
    assert_close(y, reference_plain["y"], exact["y"], "y")
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, reference_plain["d" + name], exact["d" + name], "d" + name)


def test_mask_is_independent_per_call_and_shared_by_no_one() -> None:
    """Two layers (two adapters) on one x draw two masks."""
    t = make(torch.float32, torch.float32)
    torch.manual_seed(0)
    assert int(functional.draw_seed(t["x"])) != int(functional.draw_seed(t["x"]))
