"""da beside dx: both need dh and neither the other, so da can run on what dx's last wave of tiles leaves idle.

Off in every table until a GPU has measured it; docs/kernels.md has the prediction. A second stream starts at an event
that lies before dx and is joined right behind da: a fork and a join, which a CUDA graph captures as they are. What da
reads outlives the join, so that its memory is reused only after it; what da allocates belongs to the second stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fastlora_kernels.tables import table


def pays(arch: str) -> bool:
    """Whether the table of `arch` says that da beside dx is worth its second stream."""
    return bool(table(arch).get("overlap", {}).get("da", False))


@lru_cache(maxsize=None)
def _second(index: int, main: int) -> torch.cuda.Stream:
    """The stream beside `main` (a handle) on GPU `index`: one for each, so that two users of a GPU never meet in it."""
    return torch.cuda.Stream(index)


def mark(x: Tensor, wanted: bool) -> torch.cuda.Event | None:
    """Where the current stream of x's GPU stands now; None on a CPU, or where no overlap is wanted."""
    return torch.cuda.current_stream(x.device).record_event() if wanted and x.is_cuda else None


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
