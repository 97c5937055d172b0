"""The torch backend's own dropout stream: geometric gaps that make independent Bernoulli drops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from operands import bf16, fp32
from tolerance import assert_close, assert_same
from torch import Tensor

from fastlora.eager import FEW_ELEMENTS, dropped, holes
from fastlora.functional import draw_seed, lora_linear
from fastlora.reference import dropout_scale


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_rate_and_order(p: float) -> None:
    M, K = 300, 401
    positions = holes(torch.tensor(3), M, K, p)
    assert positions.dtype == torch.int64 and bool((positions.diff() > 0).all())
    assert len(positions) == 0 or (int(positions[0]) >= 0 and int(positions[-1]) < M * K)
    sigma = math.sqrt(M * K * p * (1 - p))
    assert abs(len(positions) - M * K * p) < 5 * sigma


def test_same_seed_same_holes_and_any_seed_is_taken() -> None:
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        assert_same(holes(torch.tensor(seed), 40, 50, 0.2), holes(torch.tensor(seed), 40, 50, 0.2))
    first, second = (set(holes(torch.tensor(s), 200, 200, 0.5).tolist()) for s in (1, 2))
    overlap = len(first & second) / 40000
    assert abs(overlap - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40000)


def test_neighbours_are_independent() -> None:
    """Gaps of a Bernoulli(p) sequence: consecutive elements, and rows, are uncorrelated; both edges are reached."""
    M, K, p = 400, 500, 0.3
    kept = torch.ones(M * K, dtype=torch.float64)
    kept[holes(torch.tensor(11), M, K, p)] = 0
    z = (kept - kept.mean()).view(M, K)
    bound = 5 * p * (1 - p) / math.sqrt(M * K)
    for left, right in ((z[:, :-1], z[:, 1:]), (z[:-1], z[1:]), (z[:, :-8], z[:, 8:])):
        assert abs(float((left * right).mean())) < bound
    edges = torch.stack([torch.bincount(holes(torch.tensor(s), 1, 4, 0.5), minlength=4) for s in range(4000)])
    assert bool(((edges.double().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(4000)).all())


def test_past_the_table_of_numbers() -> None:
    """A third of 2²⁰ elements takes three rounds of the table: neither they nor two seeds' masks are correlated."""
    M, K, p = 1024, 1024, 0.3
    first, second = (holes(seed, M, K, p) for seed in seeds(2))
    for positions in (first, second):
        assert abs(len(positions) - M * K * p) < 5 * math.sqrt(M * K * p * (1 - p))
    gaps = first.diff().double()
    z = (gaps - gaps.mean()) / gaps.std()
    assert len(z) > 2 * FEW_ELEMENTS
    assert abs(float((z[FEW_ELEMENTS:] * z[:-FEW_ELEMENTS]).mean())) < 5 / math.sqrt(len(z) - FEW_ELEMENTS)
    kept = torch.ones(2, M * K, dtype=torch.float64)
    kept[0, first], kept[1, second] = 0, 0
    assert abs(float(torch.corrcoef(kept)[0, 1])) < 5 / math.sqrt(M * K)


@pytest.mark.parametrize(("main", "adapter"), [(fp32, fp32), (bf16, fp32), (bf16, bf16), (fp32, bf16)])
@pytest.mark.parametrize(("M", "K"), [(130, 1100), (3, 50_000)])  # BLAS adds at the end, or starts with what is there
@pytest.mark.parametrize("p", [0.1, 0.95])
def test_a_layer_with_a_large_mask(p: float, M: int, K: int, main: torch.dtype, adapter: torch.dtype) -> None:
    """Every output and gradient where gaps are drawn, beside PEFT's with the same elements dropped; layers as one.

    21 sums of 50,000 terms err by 0.6 to 1.7 of plain torch's error, by chance (0.96 on the mean of 40 layers).
    """
    assert M * K > FEW_ELEMENTS

    def peft(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mask = torch.full((M * K,), dropout_scale(p), dtype=torch.float64)
        mask[dropped(draw_seed(x), M, K, p)] = 0
        wide = x.to(a.dtype)
        return (x @ w.t() + (wide * mask.view(M, K).to(wide)) @ a.t() @ b.t() * 1.3).to(x.dtype)

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
    assert len(holes(torch.tensor(1), 0, 7, 0.5)) == 0
    assert len(holes(torch.tensor(1), 1, 1, 1e-9)) == 0


def seeds(count: int) -> Tensor:
    """As `draw_seed` draws them."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 0.999])
def test_few_elements_are_dropped_apart(p: float) -> None:
    """Over many seeds: each element is dropped at the rate p, of 16 bits, and no two or three together more often."""
    M, K, draws = 3, 5, 6000
    gone = torch.stack([dropped(seed, M, K, p) for seed in seeds(draws)]).double()
    variance = p * (1 - p)
    bound = 5 * math.sqrt(max(variance, 1e-4) / draws)
    assert gone.shape == (draws, M * K) and bool(((gone.mean(0) - p).abs() < bound + 2**-16).all())
    z = gone - gone.mean(0)
    pairs = torch.einsum("si,sj->ij", z, z) / draws
    assert float(pairs.fill_diagonal_(0).abs().max()) < 5 * max(variance, 1e-2) / math.sqrt(draws)
    triples = torch.einsum("si,sj,sk->ijk", z, z, z) / draws
    apart = torch.tensor([[[len({i, j, k}) == 3 for k in range(M * K)] for j in range(M * K)] for i in range(M * K)])
    assert float(triples[apart].abs().max()) < 5 * max(variance, 1e-2) ** 1.5 / math.sqrt(draws)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_how_many_of_few_are_dropped(p: float) -> None:
    """In a mask as large as they get, and in its rows: the mean and the spread of a binomial count."""
    M, K, draws = FEW_ELEMENTS // 512, 512, 400
    counts = torch.stack([dropped(seed, M, K, p).view(M, K).sum(1) for seed in seeds(draws)]).double()
    for got, size in ((counts.sum(1), M * K), (counts.view(-1), K)):
        variance, n = size * p * (1 - p), len(got)
        assert abs(float(got.mean()) - size * p) < 5 * math.sqrt(variance / n)
        assert abs(float(got.var()) / variance - 1) < 5 * math.sqrt(2 / n)


def test_which_form_depends_on_the_size_alone() -> None:
    for size, dtype in ((FEW_ELEMENTS, torch.bool), (FEW_ELEMENTS + 1, torch.int64)):
        assert dropped(torch.tensor(-7), 1, size, 0.3).dtype == dtype
        assert_same(dropped(torch.tensor(-7), 1, size, 0.3), dropped(torch.tensor(-7), 1, size, 0.3))


@pytest.mark.parametrize("M", [2, 50, 500])
def test_dropped_inf_and_nan_are_selected_away(M: int) -> None:
    """What is dropped is gone: inf and NaN in dropped places reach neither y's update nor any gradient."""
    K, p = 60, 0.4
    torch.manual_seed(2)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    x = torch.randn(M, K)
    x.view(-1)[dropped(seed, M, K, p)] = torch.tensor(float("nan"))
    x.requires_grad_()
    a, b = torch.randn(3, K, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    torch.manual_seed(2)
    y = lora_linear(x, torch.zeros(20, K), None, a, b, 1.0, dropout_p=p)
    assert bool(y.isnan().all()), "the frozen branch sees x itself"
    (da,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert bool(da.isfinite().all())
