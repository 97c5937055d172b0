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

_BATCHES = (
    "input_ids", "inputs_embeds", "inputs", "encoder_outputs", "decoder_input_ids", "decoder_inputs_embeds",
    "input_features",
)  # fmt: skip
"""Arguments whose first dimension is the batch's, the likeliest first."""

_ELSEWHERE = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of transformers' that run the model in a thread of its own, on a batch of their own making."""


_HAS_LAYERS = (
    "a bank has the model's layers, wanted it before the bank or after its close(): it would find none of PEFT's, and "
    "a file would name weights as no model does"
)


class Entry(Prompts):
    """The soft prompts of a bank's model, said with the batch and so by task as by thread, and the model's two doors.

    renew: called with the mapping that stands in this thread before each forward.
    """

    def __init__(
        self, model: Any, max_prompts: int, max_tokens: int, tables: Tables, renew: Callable[[Standing], None]
    ) -> None:
        super().__init__(model, max_prompts, max_tokens)
        self.tables, self._renew = tables, renew
        self.doors.install(self.model, "forward", self._whole)
        self.doors.install(self.model, "generate", self._multiplied)
        for name in _ELSEWHERE:
            if hasattr(self.model, name):
                self.doors.install(self.model, name, self._refused)
        for owner in dict.fromkeys((model, self.model)):
            self.doors.keep_layers(owner, _HAS_LAYERS)

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
        with self._counted(kwargs, whole=True):
            return inner(**kwargs)

    def _encoder(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The encoder's, which generate calls by itself."""
        kwargs = named(inner, args, kwargs)
        with self._counted(kwargs):
            return super()._encoder(inner, **kwargs)

    @contextlib.contextmanager
    def _counted(self, kwargs: dict[str, Any], whole: bool = False) -> Iterator[None]:
        """Layers called inside know how many rows there are.   Raises ValueError when those are not the batch's.

        whole: it is the model's forward, whose rows never get fewer while `generate` runs, unless requests leave.
        """
        turn = turn_of(self.tables)
        if turn is None or not isinstance(turn.batch, Batch) or not turn.batch.slots:
            yield
            return
        rows, requests = _rows(kwargs), len(turn.batch.slots)
        if rows % requests or (rows != requests and rows and not turn.generating):
            wanted = f"a multiple of the batch's {requests} requests" if turn.generating else f"the batch's {requests}"
            raise ValueError(f"input_ids: got {rows} rows, wanted {wanted}")
        if whole and turn.generating:
            if 0 < rows < turn.most:  # as Whisper's long form does; with beams what is left may be a multiple still
                raise ValueError(
                    f"input_ids: got {rows} rows after {turn.most} in one generate, wanted as many: requests have left "
                    "the batch, and whose rows are left cannot be known; generate with one adapter at a time"
                )
            turn.most = max(turn.most, rows)
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
        with serving.again(turn, generating=True, most=0):
            return inner(*args, **kwargs)

    def _refused(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn = turn_of(self.tables)
        if turn is not None and turn.batch is not None:
            raise RuntimeError(
                f"{inner.__name__}: got a call inside of use or after prepare, and it batches its requests itself, in "
                "another thread: whose rows they are cannot be known; wanted generate, or a loop of one's own"
            )
        return inner(*args, **kwargs)


def _rows(kwargs: dict[str, Any]) -> int:
    """The batch's first dimension; 0 where no argument has one."""
    for name in _BATCHES:
        given = kwargs.get(name)
        if given is not None:
            first = given if isinstance(given, Tensor) else given[0]
            return len(first)
    return 0
