"""One mask, everywhere: the bits of `reference.dropout_mask`, as forward, da and dx draw them, and their statistics."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import bf16, fp16, fp32, lay
from tolerance import assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile

pytestmark = pytest.mark.usefixtures("poison")

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)
WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in Python's integers (Salmon et al. 2011, fig. 4)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


KNOWN = [  # Random123, kat_vectors: philox 4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert philox(counter, key) == words  # type: ignore[arg-type]


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**28), st.integers(-(2**63), 2**63 - 1))
def test_the_reference_draws_philox(row: int, group: int, seed: int) -> None:
    words = reference._philox((torch.tensor(row), torch.tensor(group)), torch.tensor(seed))
    assert tuple(map(int, words)) == philox((row, group, 0, 0), (seed & WORD, seed >> 32 & WORD))


def test_the_first_known_answer_opens_the_mask_of_seed_0() -> None:
    """Eight lanes, low half before high half; a lane is kept from its own value's threshold downwards."""
    lanes = [half for word in KNOWN[0][2] for half in (word & 0xFFFF, word >> 16)]
    for p in (0.1, 0.4, 0.6, 0.9):
        keep = reference.dropout_mask(torch.tensor(0), 1, 8, p)[0]
        assert keep.tolist() == [lane >= round(65536 * p) for lane in lanes]


def seen(kernel: str, x: Tensor, p: float, seed: Tensor, config: Tile) -> Tensor:
    """drop(x) as a kernel sees it: multiplied by the identity, which is exact."""
    rows, cols = (torch.eye(size, device=x.device) for size in x.shape)
    if kernel == "shrink":
        return kernels.shrink(x, cols, p=p, seed=seed, config=config)
    if kernel == "x_pass":
        return kernels.x_pass(x, rows, fp32, p=p, seed=seed, config=config)
    if kernel == "low_rank_dx":
        return kernels.low_rank_dx(rows, x, fp32, p=p, seed=seed, config=config)
    dy, w = torch.zeros(len(x), 4, device=x.device), torch.zeros(4, x.shape[1], device=x.device)
    return kernels.dx(dy, w, rows, x, p=p, seed=seed, config=config)


TILES = [
    Tile(16, 16, 16),
    Tile(32, 64, 32, BLOCK_R=64),
    Tile(64, 32, 128, BLOCK_R=128, num_stages=2),  # in three, fp32 operands want 320 of an H200's 227 KiB
    Tile(128, 128, 64, BLOCK_R=128, num_stages=2),
]


@pytest.mark.parametrize(("dtype", "config"), [*((fp32, tile) for tile in TILES), (fp16, TILES[1]), (bf16, TILES[1])])
@pytest.mark.parametrize("kernel", ["shrink", "x_pass", "dx", "low_rank_dx"])
def test_forward_da_and_dx_drop_the_same_bits(kernel: str, dtype: torch.dtype, config: Tile, device: str) -> None:
    """At every tile shape: several tiles of rows, none whole, and columns that are no multiple of a Philox call."""
    M, K = config.BLOCK_M + 11, 75 if config.BLOCK_M > 16 else 43
    x = lay(torch.randn(M, K).to(device, dtype))
    seed = torch.tensor(0x0123456789ABCDEF, device=device)
    keep = reference.dropout_mask(seed, M, K, 0.4)
    assert 0.5 < keep.float().mean() < 0.7
    wanted = torch.where(keep, x.float() * reference.dropout_scale(0.4), 0)
    assert_same(seen(kernel, x, 0.4, seed, config), wanted)


@pytest.mark.parametrize("p", [2**-17, 2**-16, 0.05, 0.5, 0.9, 1 - 2**-16, 1 - 2**-20])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_seed_and_probability(seed: int, p: float, device: str) -> None:
    """A probability is one of 65536: below 2⁻¹⁷ nothing is dropped, and never everything."""
    x, drawn = torch.ones(40, 43, device=device), torch.tensor(seed, device=device)
    wanted = reference.dropout_mask(drawn, 40, 43, p) * reference.dropout_scale(p)
    ones = torch.ones(40, 1, device=device)
    assert_same(kernels.low_rank_dx(ones, x[:1], fp32, p=p, seed=drawn, config=Tile(64, 64)), wanted.float())


def test_no_seed_or_no_probability_is_no_dropout(device: str) -> None:
    x, a = torch.randn(5, 8, device=device), torch.randn(2, 8, device=device)
    plain = kernels.shrink(x, a)
    assert_same(kernels.shrink(x, a, p=0.5), plain)
    assert_same(kernels.shrink(x, a, p=0.0, seed=torch.tensor(3, device=device)), plain)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.8])
def test_rate(p: float) -> None:
    """The share of dropped elements: within five standard deviations of the p that 16 bits hold, on every axis."""
    keep = reference.dropout_mask(torch.tensor(11), 1024, 1024, p).double()
    q = 1 - reference.dropout_threshold(p) / 65536
    assert abs(q - (1 - p)) <= 2**-17
    for axis, count in ((None, 2**20), (0, 1024), (1, 1024)):
        deviations = (keep.mean(axis) - q) / (q * (1 - q) / count) ** 0.5
        assert float(deviations.abs().max()) < 5
        if axis is not None:  # neither more nor less scattered than independent draws: χ² over 1024 rows or columns
            assert abs(float(deviations.square().mean()) - 1) < 5 * (2 / 1024) ** 0.5


def correlation(left: Tensor, right: Tensor) -> float:
    """Pearson's, in standard deviations of its own under independence."""
    return float(torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1].abs()) * left.numel() ** 0.5


def test_independence_of_neighbours() -> None:
    """Columns 1…9 apart share a word, a Philox call, or neither; rows 1, 2 and 64 apart."""
    keep = reference.dropout_mask(torch.tensor(5), 512, 520, 0.3).double()
    for lag in range(1, 10):
        assert correlation(keep[:, lag:], keep[:, :-lag]) < 5
    for lag in (1, 2, 64):
        assert correlation(keep[lag:], keep[:-lag]) < 5
    for left, right in itertools.combinations(range(8), 2):  # one lane of all calls against another
        assert correlation(keep[:, left::8], keep[:, right::8]) < 5


def test_independence_of_seeds() -> None:
    """Neighbouring seeds, and seeds that differ in one bit of either half of the key."""
    seeds = [7, 8, 6, 7 + 2**31, 7 + 2**32, 7 - 2**63]
    drawn = [reference.dropout_mask(torch.tensor(seed), 256, 256, 0.5).double() for seed in seeds]
    for left, right in itertools.combinations(drawn, 2):
        assert correlation(left, right) < 5


@settings(max_examples=10)
@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0.1, 0.5, 0.9]))
def test_a_row_of_the_mask_does_not_know_its_batch(seed: int, p: float) -> None:
    """Row m, column k is a function of (seed, m, k): a larger batch or layer begins with the smaller one's mask."""
    drawn = torch.tensor(seed)
    assert_same(reference.dropout_mask(drawn, 9, 30, p)[:5, :13], reference.dropout_mask(drawn, 5, 13, p))


@pytest.mark.parametrize("shape", [(0, 30), (0, 0), (3, 0)])
def test_a_mask_of_nothing(shape: tuple[int, int]) -> None:
    assert reference.dropout_mask(torch.tensor(1), *shape, 0.5).shape == shape


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, on what is selected away
@pytest.mark.parametrize("mix", [(fp32, fp32), (bf16, fp32), (fp16, fp16)], ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_dropped_inf_and_nan_are_selected_away(bad: float, mix: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """What is dropped does not matter, bit for bit; what is kept is not swallowed."""
    M, K, R, seed, tile = 37, 50, 3, torch.tensor(2, device=device), Tile(32, 64, 32)
    x, a = (torch.randn(s, device=device).to(d) for s, d in zip(((M, K), (R, K)), mix, strict=True))
    dh = torch.randn(M, R, device=device)
    keep = reference.dropout_mask(seed, M, K, 0.3)
    spoilt = torch.where(keep, x, bad)
    forward = partial(kernels.shrink, a=a, p=0.3, seed=seed, config=tile)
    da = partial(kernels.x_pass, dh=dh, dtype=mix[1], p=0.3, seed=seed, config=tile)
    assert_same(forward(spoilt), forward(x))
    assert_same(da(spoilt), da(x))
    h = forward(torch.where(keep, bad, x))
    assert not h.isfinite().any()
    dh[5] = bad
    grad = kernels.low_rank_dx(dh, a, fp32, p=0.3, seed=seed, config=tile)
    assert_same(grad.isfinite(), ~keep | (torch.arange(M, device=device) != 5)[:, None])
    assert not grad[~keep].any()
