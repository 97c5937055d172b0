"""What dropout takes, drawn for a CPU: the gaps between dropped elements instead of one number an element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora import reference

FEW_ELEMENTS = 2**12
"""M·K up to which a bit an element, from 16-bit lanes, is drawn faster than the gaps: fewer calls."""

FEW_DRAWS = 1024
"""Up to here one `geometric_` call draws the gaps faster than five vectorised ones."""


def dropped(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """What dropout takes from an [M, K] tensor, as an index into it flattened: positions, or a bool for each element.

    The same for the same seed; from a stream of the CPU's own where seed is on a CPU.
    """
    if M * K > FEW_ELEMENTS or seed.device.type != "cpu":
        return holes(seed, M, K, p)
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(-(-M * K // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: M * K] < reference.dropout_threshold(p) - 2**15


def holes(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Flat positions of the dropped elements of an [M, K] tensor, ascending, the same for the same seed.

    On a CPU the gaps between them are drawn (geometric, so each element is dropped with probability p, independently):
    p·M·K numbers instead of M·K, from a stream of the CPU's own. Elsewhere they are `reference.dropout_mask`'s.
    """
    if seed.device.type != "cpu":
        return (~reference.dropout_mask(seed, M, K, p)).view(-1).nonzero().view(-1)
    size = M * K
    generator = torch.Generator().manual_seed(int(seed))
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
