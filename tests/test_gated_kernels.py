"""The gated MLP's own kernels against float64: each activation, dtype mix and rank, odd sizes over several tiles.

z and h may err no more than torch's own activation followed by PEFT's shrink; the gradients no more than autograd's.
"""

from __future__ import annotations

import math

import plain
import pytest
import torch
from operands import ACTS, LAYOUTS, MIXES, a_seed, bf16, double, fp16, fp32, lay, small_tile
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile

pytestmark = pytest.mark.usefixtures("poison")

M, K = 93, 70
MAIN = {"fp32": fp32, "fp16": fp16, "bf16": bf16}


def normal(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    return lay((torch.randn(shape) * std).to(device, dtype))


def plain_backward(g: Tensor, u: Tensor, dz: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Autograd's dg and du, each step in the operands' dtype."""
    g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
    dg, du = torch.autograd.grad(ACTS[activation](g) * u, (g, u), dz)
    return dg, du


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("R", [1, 7, 33, 200])
@pytest.mark.parametrize("mix", ["fp32", "bf16", "bf16+fp32", "fp16+fp32"])
def test_z_and_h_in_one_pass(mix: str, R: int, p: float, device: str) -> None:
    activation = "silu"  # of each, in the next test: h is of z, whatever made it
    main, adapter, _ = MIXES[mix]
    g, u = (normal(M, K, dtype=main, device=device, std=2) for _ in range(2))
    a, seed = normal(R, K, dtype=adapter, device=device, std=K**-0.5), a_seed(device)
    z, h = kernels.glu(g, u, activation, a, p=p, seed=seed, config=small_tile(R))
    assert h is not None and h.dtype == fp32 and h.shape == (M, R)
    alone, none = kernels.glu(g, u, activation, config=small_tile(R))
    assert none is None
    assert_same(alone, z)
    theirs = ACTS[activation](g) * u
    wanted, wanted_h = reference.glu(double(g), double(u), activation, double(a), p=p, seed=seed)
    assert_close(z, theirs, wanted, "z")
    assert_close(h, plain.shrink(theirs, a, p=p, seed=seed), wanted_h, "h")  # type: ignore[arg-type]
    twin = kernels.shrink(z, a, p=p, seed=seed, config=small_tile(R))
    assert_close(h, twin, reference.shrink(double(z), double(a), p=p, seed=seed), "h is of z as it was written")


@pytest.mark.parametrize("main", MAIN)
@pytest.mark.parametrize("activation", ACTS)
def test_each_activation_and_its_gradients(activation: str, main: str, device: str) -> None:
    """Against torch's activation, and against the twin, rounded once."""
    g, u, dz = (normal(M, K, dtype=MAIN[main], device=device, std=2) for _ in range(3))
    dg, du, z = kernels.glu_backward(g, u, dz, activation, want_z=True, config=Tile(16, BLOCK_K=32))
    forward, _ = kernels.glu(g, u, activation)
    assert z is not None and dg.dtype == du.dtype == z.dtype == MAIN[main]
    assert_same(z, forward)
    wanted = (
        *reference.glu_backward(double(g), double(u), double(dz), activation),
        ACTS[activation](double(g)) * double(u),
    )
    theirs = (*plain_backward(g, u, dz, activation), ACTS[activation](g) * u)
    twins = (*reference.glu_backward(g, u, dz, activation), reference.glu(g, u, activation)[0])
    for name, *values in zip(("dg", "du", "z"), (dg, du, z), theirs, wanted, strict=True):
        assert_close(*values, f"{name} {activation} {main}")
    for name, *values in zip(("dg", "du", "z"), (dg, du, z), twins, wanted, strict=True):
        assert_close(*values, f"{name} {activation} {main} beside its twin")


@pytest.mark.parametrize("activation", ACTS)
def test_the_twins_formulas_are_torchs(activation: str) -> None:
    g, u, dz = (torch.randn(30, 40, dtype=torch.float64) * 3 for _ in range(3))
    for ours, theirs in zip(
        reference.glu_backward(g, u, dz, activation), plain_backward(g, u, dz, activation), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12)
    assert torch.allclose(reference.glu(g, u, activation)[0], ACTS[activation](g) * u, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTS)
def test_across_the_whole_range(activation: str, device: str) -> None:
    """From where everything passes to where nothing does: near torch element by element, and no NaN on the way."""
    size = torch.logspace(-6, math.log10(3e4), 300)
    g = torch.cat((-size.flip(0), torch.zeros(1), size))[None].to(device)
    one = torch.ones_like(g)
    z, _ = kernels.glu(g, one, activation)
    dg, _, _ = kernels.glu_backward(g, one, one, activation)
    exact = ACTS[activation](g.double())
    slope, _ = plain_backward(g.double(), one.double(), one.double(), activation)
    for ours, wanted in ((z, exact), (dg, slope)):
        assert ((ours.double() - wanted).abs() <= 2e-6 * wanted.abs() + 2e-6).all()


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_what_relu_lets_through(activation: str, device: str) -> None:
    """NaN passes and an infinity behind a closed gate does not, as in torch."""
    inf, nan = math.inf, math.nan
    g = torch.tensor([[-inf, -1.0, 0.0, 2.0, nan]], device=device)
    u = torch.tensor([[1.0, 3.0, 1.0, -1.0, 1.0]], device=device)
    dz = torch.tensor([[1.0, inf, inf, 1.0, 1.0]], device=device)
    dg, du, z = kernels.glu_backward(g, u, dz, activation, want_z=True)
    theirs = *plain_backward(g, u, dz, activation), ACTS[activation](g) * u
    for ours, wanted in zip((dg, du, z), theirs, strict=True):
        if activation == "relu" or ours is z:
            assert_same(ours, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, device: str) -> None:
    g, u, dz = (normal(M, K, dtype=bf16, device=device) for _ in range(3))
    a = normal(7, K, dtype=fp32, device=device)
    laid = [LAYOUTS[layout](t) for t in (g, u, dz, a)]
    for one, other in zip(kernels.glu(g, u, "silu", a), kernels.glu(laid[0], laid[1], "silu", laid[3]), strict=True):
        assert_same(one, other)
    expected = kernels.glu_backward(g, u, dz, "silu", want_z=True)
    for one, other in zip(expected, kernels.glu_backward(*laid[:3], "silu", want_z=True), strict=True):
        assert_same(one, other)
    flat = dz[:, :1].expand(M, K)  # stride 0
    same = kernels.glu_backward(g, u, flat, "silu"), kernels.glu_backward(g, u, flat.contiguous(), "silu")
    assert_same(same[0][0], same[1][0])


def test_du_takes_dzs_place(device: str) -> None:
    g, u, dz = (normal(M, K, dtype=bf16, device=device) for _ in range(3))
    dg, du, none = kernels.glu_backward(g, u, dz, "gelu")
    place = dz.clone()
    dg_again, same, _ = kernels.glu_backward(g, u, place, "gelu", du=place)
    assert same is place and none is None
    assert_same(place, du)
    assert_same(dg_again, dg)


@pytest.mark.parametrize("R", [0, 5])
@pytest.mark.parametrize("shape", [(0, 9), (4, 0), (1, 1)])
def test_empty_and_tiny(shape: tuple[int, int], R: int, device: str) -> None:
    g, u = torch.randn(shape, device=device), torch.randn(shape, device=device)
    a = torch.randn(R, shape[1], device=device) if R else None
    z, h = kernels.glu(g, u, "silu", a)
    assert z.shape == shape and (h is None) == (a is None)
    if h is not None:
        assert h.shape == (shape[0], R) and (shape == (1, 1) or not h.any())
    for grad in kernels.glu_backward(g, u, torch.randn(shape, device=device), "silu", want_z=True):
        assert grad is not None and grad.shape == shape


def test_few_rows_are_split_in_a_fixed_order(device: str) -> None:
    """At few rows h is a sum of parts, the same bits each time; a split that depended on time would show."""
    g, u = (normal(3, 2100, dtype=bf16, device=device) for _ in range(2))
    a, seed = normal(20, 2100, dtype=fp32, device=device, std=0.02), a_seed(device)
    runs = [kernels.glu(g, u, "silu", a, p=0.1, seed=seed, config=Tile(16, BLOCK_K=64)) for _ in range(2)]
    assert runs[0][1] is not None and runs[1][1] is not None
    assert_same(runs[0][1], runs[1][1])
    z = runs[0][0]
    assert_close(
        runs[0][1], plain.shrink(z, a, p=0.1, seed=seed), reference.shrink(double(z), double(a), p=0.1, seed=seed)
    )
