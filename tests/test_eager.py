"""The torch backend's own dropout stream: of one seed, drops that are independent of each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from operands import bf16, fp16, fp32, scaled_mask
from tolerance import assert_close, assert_same
from torch import Tensor

from fastlora.eager import drop
from fastlora.eager.dropout import TABLE, drop_
from fastlora.eager.few import FEW_INPUTS
from fastlora.functional import draw_seed, lora_linear
from fastlora.reference import dropout_threshold


def seeds(count: int) -> Tensor:
    """As `draw_seed` draws them."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(7))


def gone(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """[M, K] float64, 1 where an element is dropped."""
    return (drop(torch.ones(M, K), seed, p, fp32) == 0).double()


def rate(p: float) -> float:
    """The p that 16 bits can hold."""
    return dropout_threshold(p) / 65536


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.001, 0.05, 0.3, 0.4979, 0.498, 0.4982, 0.5, 0.9, 0.996, 0.9962, 0.9999])
def test_rate(p: float) -> None:
    """At every p, on both sides of where lanes below 0, or floats at all, no longer suffice."""
    M, K, held = 3000, 401, rate(p)
    count = float(gone(torch.tensor(3), M, K, p).sum())
    assert abs(count - M * K * held) <= 5 * math.sqrt(M * K * held * (1 - held))


@pytest.mark.parametrize("p", [0.4962, 0.498, 0.5, 0.502])
def test_a_thread_that_flushes_denormals_drops_the_same(p: float) -> None:
    """Of a layer's two passes one may run so: autograd has threads of its own."""
    x, seed = torch.ones(512, 512), torch.tensor(5)
    usual = drop(x, seed, p, fp32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        flushed = drop(x, seed, p, fp32)
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, usual)


def test_same_seed_same_mask_and_any_seed_is_taken() -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert_same(gone(torch.tensor(seed), 40, 50, 0.2), gone(torch.tensor(seed), 40, 50, 0.2))
        assert abs(float(gone(torch.tensor(seed), 40, 50, 0.2).mean()) - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 2000)
    overlap = float((gone(torch.tensor(1), 200, 200, 0.5) * gone(torch.tensor(2), 200, 200, 0.5)).mean())
    assert abs(overlap - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40000)


@pytest.mark.parametrize("p", [0.3, 0.99, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, fp32, bf16, fp16])
@pytest.mark.parametrize("parts", [50, 600], ids=["two hashes", "one"])
def test_a_mask_is_the_seeds_whatever_it_is_laid_on(parts: int, dtype: torch.dtype, p: float) -> None:
    """Any dtype to any other, strided rows, and in place; of 60 rows, 50 of which share a hash, or all."""
    M, K, seed = 60, TABLE // parts, torch.tensor(-7)
    keep = drop(torch.ones(M, K), seed, p, fp32) != 0
    x, term = torch.randn(K, M).to(dtype).t(), torch.randn(M, K)
    expected = torch.where(keep, x, 0)
    for out in (torch.float64, fp32, bf16, fp16):
        assert_same(drop(x, seed, p, out), expected.to(out))
        own = term.to(out)
        assert drop_(own, seed, p) is own
        assert_same(own, torch.where(keep, term.to(out), 0))


def test_every_bit_of_a_seed_counts_for_every_element() -> None:
    """t is odd: 2³¹ more in a seed turns the sign of every lane, so at p = 0.498 what was dropped is kept."""
    both = gone(torch.tensor(5), 512, 512, 0.498) + gone(torch.tensor(5 + 2**31), 512, 512, 0.498)
    assert float((both == 1).double().mean()) > 0.99


def test_neighbours_are_independent() -> None:
    """Neighbours in a row, in a column and a vector apart, and elements hashed by the same number of the table."""
    M, K, p = 5, TABLE // 2, 0.3
    z = gone(torch.tensor(11), M, K, p).view(-1) - p
    for apart in (1, 2, 8, 16, K, TABLE):
        pairs = z[apart:] * z[:-apart]
        assert abs(float(pairs.mean())) < 5 * p * (1 - p) / math.sqrt(len(pairs))
    other = gone(torch.tensor(12), M, K, p).view(-1) - p
    assert abs(float((z * other).mean())) < 5 * p * (1 - p) / math.sqrt(M * K)


@pytest.mark.parametrize(("main", "adapter"), [(fp32, fp32), (bf16, fp32), (bf16, bf16), (fp32, bf16)])
# more than are few, and of many outputs; BLAS adds at the end, or to what is there
@pytest.mark.parametrize(("M", "K"), [(260, 1100), (3, 50_000)])
@pytest.mark.parametrize("p", [0.1, 0.95])
def test_a_layer_with_a_large_mask(p: float, M: int, K: int, main: torch.dtype, adapter: torch.dtype) -> None:
    """Every output and gradient beside PEFT's with the same elements dropped; layers as one.

    21 sums of 50,000 terms err by 0.6 to 1.7 of plain torch's error, by chance (0.96 on the mean of 40 layers).
    """
    assert M * K > FEW_INPUTS

    def peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide = x.to(a.dtype)
        mask = scaled_mask(draw_seed(x), M, K, p, "torch").to(wide)
        return (x @ w.t() + (wide * mask) @ a.t() @ b.t() * 1.3).to(x.dtype)

    def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, w, None, a, b, 1.3, dropout_p=p)

    def results(layer: Callable[..., Tensor], seed: int, *given: Tensor) -> list[Tensor]:
        x, w, a, b, dy = given
        x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
        torch.manual_seed(seed)
        y = layer(x, w, a, b)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]

    sides: list[list[list[Tensor]]] = [[], [], []]
    for draw in range(4 if M > 3 else 16):
        made = torch.randn(M, K), torch.randn(40, K) * K**-0.5, torch.randn(7, K) * K**-0.5, torch.randn(40, 7)
        given = [t.to(dtype) for t, dtype in zip(made, (main, main, adapter, adapter), strict=True)]
        given.append(torch.randn(M, 40).to(main))
        wide = [t.double() for t in given]
        for side, (layer, operands) in zip(sides, ((ours, given), (peft, given), (peft, wide)), strict=True):
            side.append(results(layer, draw, *operands))
    for name, *found in zip(("y", "dx", "da", "db"), *(zip(*side, strict=True) for side in sides), strict=True):
        assert_close(*map(torch.cat, found), name)


def test_empty_and_tiny() -> None:
    assert drop(torch.ones(0, 7), torch.tensor(1), 0.5, bf16).shape == (0, 7)
    assert drop(torch.ones(7, 0), torch.tensor(1), 0.5, bf16).shape == (7, 0)
    assert drop(torch.ones(1, 1), torch.tensor(1), 1e-9, fp32).item() == 1


@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 0.999])
def test_elements_are_dropped_apart(p: float) -> None:
    """Over many seeds: each element is dropped at the rate p, of 16 bits, and no two or three together more often."""
    M, K, draws = 3, 5, 6000
    drops = torch.stack([gone(seed, M, K, p).view(-1) for seed in seeds(draws)])
    variance = p * (1 - p)
    bound = 5 * math.sqrt(max(variance, 1e-4) / draws)
    assert drops.shape == (draws, M * K) and bool(((drops.mean(0) - p).abs() < bound + 2**-16).all())
    z = drops - drops.mean(0)
    pairs = torch.einsum("si,sj->ij", z, z) / draws
    assert float(pairs.fill_diagonal_(0).abs().max()) < 5 * max(variance, 1e-2) / math.sqrt(draws)
    triples = torch.einsum("si,sj,sk->ijk", z, z, z) / draws
    apart = torch.tensor([[[len({i, j, k}) == 3 for k in range(M * K)] for j in range(M * K)] for i in range(M * K)])
    assert float(triples[apart].abs().max()) < 5 * max(variance, 1e-2) ** 1.5 / math.sqrt(draws)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_how_many_are_dropped(p: float) -> None:
    """In a mask, and in its rows: the mean and the spread of a binomial count."""
    M, K, draws = 256, 512, 400
    counts = torch.stack([gone(seed, M, K, p).sum(1) for seed in seeds(draws)])
    for got, size in ((counts.sum(1), M * K), (counts.view(-1), K)):
        variance, n = size * p * (1 - p), len(got)
        assert abs(float(got.mean()) - size * p) < 5 * math.sqrt(variance / n)
        assert abs(float(got.var()) / variance - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("M", [2, 50, 5000])
def test_dropped_inf_and_nan_are_selected_away(M: int) -> None:
    """What is dropped is gone: inf and NaN in dropped places reach neither y's update nor any gradient."""
    K, p = 60, 0.4
    torch.manual_seed(2)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    x = torch.randn(M, K).masked_fill_(gone(seed, M, K, p) > 0, float("nan")).requires_grad_()
    a, b = torch.randn(3, K, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    torch.manual_seed(2)
    y = lora_linear(x, torch.zeros(20, K), None, a, b, 1.0, dropout_p=p)
    assert bool(y.isnan().all()), "the frozen branch sees x itself"
    (da,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert bool(da.isfinite().all())
