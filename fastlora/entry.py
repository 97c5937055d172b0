"""Where a bank's model is entered: its rows are compared with the batch's requests, and soft prompts come before them.

`forward` takes a row for each request; inside `generate`, which multiplies requests (beams, num_return_sequences), as
many rows for each, side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fastlora import serving
from fastlora.multi import Batch, Tables
from fastlora.prompts import PromptOf, Prompts, Requests, named
from fastlora.serving import turn_of
from fastlora.standing import Standing

_BATCHES = ("input_ids", "inputs_embeds", "inputs", "encoder_outputs", "decoder_input_ids", "decoder_inputs_embeds")
"""Arguments whose first dimension is the batch's, the likeliest first."""


class Entry(Prompts):
    """The soft prompts of a bank's model, said with the batch and so by task as by thread, and the model's two doors.

    renew: called with the mapping that stands in this thread before each forward.
    """

    def __init__(
        self, model: Any, max_prompts: int, max_tokens: int, tables: Tables, renew: Callable[[Standing], None]
    ) -> None:
        super().__init__(model, max_prompts, max_tokens)
        self.tables, self._renew = tables, renew
        self._install(self.model, "forward", self._whole)
        self._install(self.model, "generate", self._multiplied)

    @contextlib.contextmanager
    def serving(self, requests: Sequence[PromptOf | None] | None) -> Iterator[None]:
        turn = turn_of(self.tables) or serving.Turn(self.tables, None)
        prompts = tuple(requests) if requests and any(requests) else None
        with super().serving(requests), serving.again(turn, prompts=prompts):
            yield

    def _requests(self) -> Requests | None:
        turn = turn_of(self.tables)
        return None if turn is None else turn.prompts

    def _whole(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        turn = turn_of(self.tables)
        if turn is None:
            return inner(*args, **kwargs)
        if isinstance(turn.batch, Standing):
            self._renew(turn.batch)
        kwargs = named(inner, args, kwargs)
        with self._counted(kwargs):
            return inner(**kwargs)

    def _encoder(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The encoder's, which generate calls by itself."""
        kwargs = named(inner, args, kwargs)
        with self._counted(kwargs):
            return super()._encoder(inner, **kwargs)

    @contextlib.contextmanager
    def _counted(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Layers called inside know how many rows there are.   Raises ValueError when those are not the batch's."""
        turn = turn_of(self.tables)
        if turn is None or not isinstance(turn.batch, Batch) or not turn.batch.slots:
            yield
            return
        rows, requests = _rows(kwargs), len(turn.batch.slots)
        if rows % requests or (rows != requests and rows and not turn.generating):
            wanted = f"a multiple of the batch's {requests} requests" if turn.generating else f"the batch's {requests}"
            raise ValueError(f"input_ids: got {rows} rows, wanted {wanted}")
        with serving.again(turn, rows=rows):
            yield

    def _multiplied(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """generate, called with a row for each request."""
        turn = turn_of(self.tables)
        if turn is None or not isinstance(turn.batch, Batch) or not turn.batch.slots:
            return inner(*args, **kwargs)
        rows, requests = _rows({"inputs": args[0], **kwargs} if args else kwargs), len(turn.batch.slots)
        if rows not in (0, requests):
            raise ValueError(f"inputs: got {rows} rows, wanted the batch's {requests}; generate makes the beams")
        with serving.again(turn, generating=True):
            return inner(*args, **kwargs)


def _rows(kwargs: dict[str, Any]) -> int:
    """The batch's first dimension; 0 where no argument has one."""
    for name in _BATCHES:
        given = kwargs.get(name)
        if given is not None:
            first = given if isinstance(given, Tensor) else given[0]
            return len(first)
    return 0
