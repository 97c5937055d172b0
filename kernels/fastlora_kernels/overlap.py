"""A second stream: da beside dx, which both need dh and neither the other, so that da runs on what dx's last wave of
tiles leaves idle; and, where many adapters are served from a CUDA graph, shrink beside the base layers' matmuls.

Off in every table until a GPU has measured it; docs/kernels.md has the predictions. The second stream starts at an
event before dx, or before the base, and is joined behind it: a fork and a join, which a CUDA graph captures as they
are. What runs there reads what outlives the join, so that its memory is reused only after it; what it allocates
belongs to the second stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fastlora_kernels.tables import table


def pays(arch: str, what: str = "da") -> bool:
    """Whether the table of `arch` says that "da", or "shrink", is worth a second stream."""
    return bool(table(arch).get("overlap", {}).get(what, False))


@lru_cache(maxsize=None)
def _second(index: int, main: int) -> torch.cuda.Stream:
    """The stream beside `main` (a handle) on GPU `index`: one for each, so that two users of a GPU never meet in it."""
    return torch.cuda.Stream(index)


def mark(x: Tensor, wanted: bool) -> torch.cuda.Event | None:
    """Where the current stream of x's GPU stands now; None on a CPU, or where no overlap is wanted."""
    return torch.cuda.current_stream(x.device).record_event() if wanted and x.is_cuda else None


def captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being made of what x's GPU does: only there a fork and a join cost the host nothing."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def ahead(x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives on the second stream of x's GPU, beside the current one's launches from here to `join`.

    Its memory is the second stream's: the next fork takes it, behind whatever the current one did with it by then.
    """
    main = torch.cuda.current_stream(x.device)
    second = _second(main.device_index, main.cuda_stream)
    second.wait_stream(main)
    with torch.cuda.stream(second):
        return make()


def join(x: Tensor) -> None:
    """The current stream of x's GPU waits for what was begun `ahead`."""
    main = torch.cuda.current_stream(x.device)
    main.wait_stream(_second(main.device_index, main.cuda_stream))


@contextlib.contextmanager
def aside(x: Tensor, since: torch.cuda.Event | None) -> Iterator[None]:
    """Inside, launches go to the second stream of x's GPU, after `since`; on the way out the current stream waits.

    since: from `mark`; None leaves everything in the current stream.
    """
    if since is None:
        yield
        return
    main = torch.cuda.current_stream(x.device)
    second = _second(main.device_index, main.cuda_stream)
    second.wait_event(since)
    with torch.cuda.stream(second):
        yield
    main.wait_stream(second)
