"""What dropout takes, drawn for a CPU: of few elements a hash each, of many the gaps between dropped ones."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastlora import reference

FEW_ELEMENTS = 2**17
"""M·K up to which hashing each element and laying the bits on x is faster than drawing gaps (20 µs) and filling them.

A layer at this size takes 0.91 to 1.01 of the time, at half of it 0.80 to 0.93, at twice 0.99 to 1.04."""

_WORD = 2**64 - 1


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
    size, key = M * K, int(seed)
    expected = size * p
    draws = int(expected + 6 * math.sqrt(expected * (1 - p)) + 16)  # six sigma: one pass is enough
    runs: list[Tensor] = []
    end = -1
    while end < size:
        runs.append(_gaps(key, len(runs) * draws, draws, p).cumsum_(0).add_(end))
        end = int(runs[-1][-1])
    positions = runs[0] if len(runs) == 1 else torch.cat(runs)
    return positions[: int(torch.searchsorted(positions, size))]


def _gaps(key: int, first: int, draws: int, p: float) -> Tensor:
    """How far each dropped element lies from the one before it: geometric, from 1.   first: of the key's numbers."""
    lanes = _numbers(key, first, draws).bitwise_right_shift_(40)
    rest = torch.sub(_half(), lanes, alpha=2**-24)  # uniform in (0, 1], of 24 bits: its logarithm is finite
    return rest.log_().mul_(1 / math.log1p(-p)).to(torch.int64).add_(1)


def _numbers(key: int, first: int, count: int) -> Tensor:
    """[count] int64, uniform: the table's, each times the key's own odd number; past its end, times the next key's.

    A third of the time that torch's generator takes, which draws one after the other.
    """
    table, parts = _table(), []
    while count:
        row, at = divmod(first, len(table))
        part = table[at : at + count] * _odd(key + row)
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _odd(key: int) -> int:
    """A random odd number of 64 bits for each key, 0 too: SplitMix64's (Steele et al. 2014)."""
    z = (key + 0x9E3779B97F4A7C15) & _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    z = (z ^ (z >> 31)) | 1
    return z - 2**64 if z >= 2**63 else z


@lru_cache
def _half() -> Tensor:
    return torch.tensor(0.5, device="cpu")
