"""A batch that stands: its mapping lies in buffers that never move, for CUDA graphs and for engines of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import dispatch, ops
from fastlora.multi import MAX_RANK, Batch, Tables


class Standing(Batch):
    """A batch said token by token in fixed buffers: a captured CUDA graph replays with what was copied in last.

    tokens: M.   mapping: [M] int32, the slot of each row of x, −1 where the number that was asked for means nobody.
    edition: the tables', when that was looked up.
    """

    def __init__(self, tables: Tables, tokens: int) -> None:
        super().__init__(tables, (), {})
        device = tables.start.device
        self.edition = -1
        self.width = min(tables.rows, MAX_RANK)  # whoever comes later
        self._probe = torch.empty(0, device=device)
        self._buffers: Any = None
        self._seen: Batch | None = None
        with torch.inference_mode(False):  # they outlive the caller's inference mode
            self.mapping = torch.full((tokens,), -1, dtype=torch.int32, device=device)
            self._asked = torch.zeros(tokens, dtype=torch.int32, device=device)

    def ask(self, mapping: Tensor) -> None:
        """Take over mapping: [M], whatever integer dtype and values; with int32 on the device nothing is allocated, and
        nothing waits. Numbers out of bounds are the base alone."""
        last = self.tables.slots
        if mapping.dtype != torch.int32:  # what is too large for int32 must not come out as another's slot
            mapping = mapping.long().clamp(-1, last)
        self._asked.copy_(mapping, non_blocking=True).clamp_(-1, last).add_(1)
        self.look()

    def look(self) -> None:
        """Look up whose numbers these are by now."""
        self.edition, self._seen = self.tables.edition, None
        torch.index_select(self.tables.given, 0, self._asked, out=self.mapping)
        if dispatch.backend_of(self._probe) == "triton":
            if self._buffers is None:
                with torch.inference_mode(False):
                    M, slots = len(self.mapping), self.tables.slots
                    self._buffers = ops.kernels.Routes.empty(M, slots, self.mapping.device)
            ops.kernels.route(self.mapping, self._buffers)

    def rest(self) -> None:
        """The base alone, for graphs too that were captured over these buffers."""
        self._asked.zero_()
        self.look()

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
        """The same batch with slots that the host has read, once for each look."""
        if self._seen is None:
            self._seen = Batch(self.tables, self.mapping.tolist(), dict(enumerate(self.tables.widest)))
        return self._seen
