"""A batch that stands: its mapping lies in buffers that never move, for CUDA graphs and for engines of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import dispatch, ops
from fastlora.multi import MAX_RANK, Batch, Tables


class Standing(Batch):
    """A batch said token by token in fixed buffers: a captured CUDA graph replays with what was copied in last.

    tokens: M.   mapping: [M] int32, the slot of each row of x.   A slot that nobody is in is the base alone.
    """

    def __init__(self, tables: Tables, tokens: int) -> None:
        super().__init__(tables, (), {})
        device = tables.start.device
        self.mapping = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.width = min(tables.rows, MAX_RANK)  # whoever comes later
        self._probe = torch.empty(0, device=device)
        self._buffers: Any = None
        self._seen: tuple[int, Batch] | None = None

    def copy_(self, mapping: Tensor) -> None:
        """Take over mapping: [M], whatever integer dtype; nothing is allocated the second time, and nothing waits."""
        self.mapping.copy_(mapping, non_blocking=True)
        self._seen = None
        if dispatch.backend_of(self._probe) == "triton":
            if self._buffers is None:
                self._buffers = ops.kernels.Routes.empty(len(mapping), self.tables.slots, self.mapping.device)
            ops.kernels.route(self.mapping, self._buffers)

    def share(self, x: Tensor) -> int:
        if x.shape[:-1].numel() != len(self.mapping):
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted the {len(self.mapping)} rows that were prepared")
        return 1

    def routes(self, x: Tensor) -> Any:
        self.share(x)
        return self._buffers

    def rows(self, x: Tensor) -> Tensor:
        self.share(x)
        return self.mapping

    def on_host(self) -> Batch:
        """The same batch with slots that the host has read, made again when an adapter came or went."""
        edition, widest = self.tables.edition, self.tables.widest
        if self._seen is None or self._seen[0] != edition:
            slots = [slot if 0 <= slot < len(widest) and widest[slot] else -1 for slot in self.mapping.tolist()]
            self._seen = edition, Batch(self.tables, slots, dict(enumerate(widest)))
        return self._seen[1]
