"""Poisoned outputs: what a launcher allocates starts as NaN and lies between guards that nobody may write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

GUARD = 4096
"""NaN elements on either side."""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `Tensor.new_empty` gives NaN; on the way out every guard must still be whole."""
    plain = torch.Tensor.new_empty
    grounds: list[Tensor] = []

    def new_empty(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        shaped = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        if not shaped.is_floating_point():
            return shaped
        ground = plain(shaped, shaped.numel() + 2 * GUARD).fill_(float("nan"))
        grounds.append(ground)
        return ground[GUARD : GUARD + shaped.numel()].view(shaped.shape)

    torch.Tensor.new_empty = new_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = plain  # type: ignore[method-assign]
    for ground in grounds:
        assert ground[:GUARD].isnan().all() and ground[-GUARD:].isnan().all(), "written outside the output"
