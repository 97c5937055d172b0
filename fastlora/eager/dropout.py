"""What dropout takes, drawn for a CPU: of few elements a hash each, of many the gaps between dropped ones."""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor

from fastlora import reference

FEW_ELEMENTS = 2**17
"""M·K up to which hashing each element and laying the bits on x is faster than drawing gaps (20 µs) and filling them.

A layer at this size takes 0.91 to 1.01 of the time, at half of it 0.80 to 0.93, at twice 0.99 to 1.04."""

FEW_DRAWS = 1024
"""Up to here one `geometric_` call draws the gaps faster than five vectorised ones."""


class _Stream(threading.local):
    """A thread's own generator, seeded anew before each use: making one costs as much as drawing from it."""

    def __init__(self) -> None:
        self.generator = torch.Generator()


_stream = _Stream()


def bits(seed: Tensor, M: int, K: int, p: float) -> tuple[Tensor, float]:
    """[M, K] bool on a CPU, true where an element is dropped, the same for the same seed, and the scale of the others.

    Element i is dropped where t[i]·seed mod 2⁶⁴ is small, for a fixed random odd t[i]: uniform over the seeds, and over
    them any few elements are independent, unless small multiples of their t add up to 0.
    """
    t, bound, scale = _hash(M, K, p)
    return t * seed < bound, scale


@lru_cache
def _hash(M: int, K: int, p: float) -> tuple[Tensor, Tensor, float]:
    """t: [M, K] int64.   bound: what is below it is small; a tensor, because a number takes 2 µs more.   scale."""
    bound = torch.tensor((reference.dropout_threshold(p) << 48) - 2**63, dtype=torch.int64, device="cpu")
    return _table()[: M * K].view(M, K), bound, reference.dropout_scale(p)


@lru_cache
def _table() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (FEW_ELEMENTS,), generator=generator, device="cpu") | 1


def dropped(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """What the torch backend drops from an [M, K] tensor, as an index into it flattened: its bits, or its holes."""
    few = M * K <= FEW_ELEMENTS and seed.device.type == "cpu"
    return bits(seed, M, K, p)[0].reshape(-1) if few else holes(seed, M, K, p)


def holes(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Flat positions of the dropped elements of an [M, K] tensor, ascending, the same for the same seed.

    On a CPU the gaps between them are drawn (geometric, so each element is dropped with probability p, independently):
    p·M·K numbers instead of M·K, from a stream of the CPU's own. Elsewhere they are `reference.dropout_mask`'s.
    """
    if seed.device.type != "cpu":
        return (~reference.dropout_mask(seed, M, K, p)).view(-1).nonzero().view(-1)
    size = M * K
    generator = _stream.generator.manual_seed(int(seed))
    expected = size * p
    draws = int(expected + 6 * math.sqrt(expected * (1 - p)) + 16)  # six sigma: one pass is enough
    runs, end = [], -1
    while end < size:
        runs.append(_gaps(draws, p, generator).cumsum_(0).add_(end))
        end = int(runs[-1][-1])
    positions = runs[0] if len(runs) == 1 else torch.cat(runs)
    return positions[: int(torch.searchsorted(positions, size))]


def _gaps(draws: int, p: float, generator: torch.Generator) -> Tensor:
    """How far each dropped element lies from the one before it: geometric, from 1."""
    if draws <= FEW_DRAWS:
        return torch.empty(draws, dtype=torch.int64).geometric_(p, generator=generator)
    gaps = torch.rand(draws, generator=generator).neg_().log1p_()  # u in [0, 1) has 24 bits: log1p(-u) is finite
    return gaps.mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)
