"""What dropout takes, drawn for a CPU: the gaps between dropped elements instead of one number an element."""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor

from fastlora import reference

FEW_ELEMENTS = 2**14
"""M·K up to which a bit an element is drawn faster than the gaps: fewer calls."""

FEW_BITS = 2**10
"""Of those, up to which one call that takes 8 ns a bit is faster than three that cut 16-bit lanes out of words."""

FEW_DRAWS = 1024
"""Up to here one `geometric_` call draws the gaps faster than five vectorised ones."""


class _Stream(threading.local):
    """A thread's own generator, seeded anew before each use: making one costs as much as drawing from it."""

    def __init__(self) -> None:
        self.generator = torch.Generator()


_stream = _Stream()


def bits(seed: int, M: int, K: int, p: float) -> Tensor:
    """[M, K] bool on a CPU, true where an element is dropped, the same for the same seed: of 16 bits' probability."""
    share, bound, like = _bits(M, K, p)
    generator = _stream.generator.manual_seed(seed)
    if like is not None:
        return like.bernoulli(share, generator=generator)
    words = torch.randint(-(2**63), 2**63 - 1, (M, -(-K // 4)), generator=generator, device="cpu")  # four lanes each
    gone = words.view(torch.int16) < bound
    return gone if K % 4 == 0 else gone[:, :K]


@lru_cache
def _bits(M: int, K: int, p: float) -> tuple[float, Tensor, Tensor | None]:
    """The share of lanes that are dropped; the lane, with a sign, below which they lie, a tensor because a number takes
    twice the time; and for `FEW_BITS` an [M, K] to be like, of one byte, because an empty one is one call more."""
    threshold = reference.dropout_threshold(p)
    bound = torch.tensor(threshold - 2**15, dtype=torch.int16, device="cpu")
    like = torch.zeros((), dtype=torch.bool, device="cpu").expand(M, K) if M * K <= FEW_BITS else None
    return threshold / 65536, bound, like


def dropped(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """What the torch backend drops from an [M, K] tensor, as an index into it flattened: its bits, or its holes."""
    few = M * K <= FEW_ELEMENTS and seed.device.type == "cpu"
    return bits(int(seed), M, K, p).reshape(-1) if few else holes(seed, M, K, p)


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
