"""Which batch a layer serves: what is said around the call, for the task or thread that says it, or what stands."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

BASE = "__base__"
"""The name of no adapter at all, as None is."""


@dataclass(eq=False)
class Turn:
    """A batch while it is served.

    tables: those of its bank; None for every bank's.   batch: None for the base alone.   prompts: the soft prompt of
    each request.   rows: the first dimension of what the model was called with; 0 where nobody has said.
    generating: whether `generate` runs, which multiplies requests.   most: the most rows that it has run so far.
    over: a task that was begun inside may outlive it.
    """

    tables: Any
    batch: Any
    prompts: Any = None
    rows: int = 0
    generating: bool = False
    most: int = 0
    over: bool = False


_turns: ContextVar[tuple[Turn, ...]] = ContextVar("turns", default=())
"""The innermost first."""

_counting = threading.Lock()


def turn_of(tables: Any) -> Turn | None:
    """What the layers of a bank serve here: the innermost turn, else what stands in this thread.

    torch.compile cannot read a context variable; where nobody anywhere has said anything it need not, and the base
    alone is one graph.
    """
    if not tables.said and torch.compiler.is_compiling():
        return None
    found = entered(tables)
    return found if found is not None else getattr(tables.standing, "turn", None)


def entered(tables: Any) -> Turn | None:
    """The innermost turn of a bank.   Raises RuntimeError where it has ended: its adapters may have left."""
    for turn in _turns.get():
        if turn.tables is tables or turn.tables is None:
            if turn.over:
                raise RuntimeError("use: got a call after its end, in a task or thread that was begun inside of it")
            return turn
    return None


def current() -> Any:
    """The innermost batch that is served here, of whatever bank."""
    turns = _turns.get()
    return turns[0].batch if turns else None


@contextlib.contextmanager
def taking(turn: Turn) -> Iterator[None]:
    """Layers called inside, in this task or thread, serve the turn, and afterwards what they did before.

    Raises RuntimeError where it ends as another than the innermost here: a generator that holds it was resumed beside
    another's, or by another thread or task, and what ran since may have served somebody else's adapters.
    """
    _count(turn.tables, 1)
    _turns.set((turn, *_turns.get()))
    failed = True
    try:
        yield
        failed = False
    except GeneratorExit:
        failed = False
        raise
    finally:
        turn.over = True
        _count(turn.tables, -1)
        turns = _turns.get()
        _turns.set(tuple(other for other in turns if other is not turn))
        if not failed and turns[:1] != (turn,):
            raise RuntimeError(
                "use: ended where another is the innermost, or none: a generator must not yield inside of it unless it "
                "is run to its end in one thread or task, with no other use begun between; its last calls may have "
                "served somebody else's adapters"
            )


def _count(tables: Any, one: int) -> None:
    if tables is not None:
        with _counting:
            tables.said += one


def serving(batch: Any) -> contextlib.AbstractContextManager[None]:
    """As `taking`, a batch without soft prompts; None: the base alone, of every bank."""
    return taking(Turn(None if batch is None else batch.tables, batch))


def again(turn: Turn, **changes: Any) -> contextlib.AbstractContextManager[None]:
    """As `taking`, a turn that goes on with something changed."""
    return taking(replace(turn, **changes))


def stand(tables: Any, batch: Any) -> None:
    """The bank's layers serve `batch` in this thread wherever no turn says otherwise; None: the base alone."""
    _count(tables, (batch is not None) - (standing(tables) is not None))
    tables.standing.turn = None if batch is None else Turn(tables, batch)


def standing(tables: Any) -> Any:
    """The batch that stands in this thread."""
    turn = getattr(tables.standing, "turn", None)
    return None if turn is None else turn.batch
