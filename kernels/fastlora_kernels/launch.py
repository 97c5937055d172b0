"""The one way from a launcher to its kernel: on the operands' own GPU, and with little Python the second time.

What a launch is told beside its tensors, grid, sizes, strides and constants, is a function of their layouts alone: each
launcher plans it once for a layout, and remembers it as a `Launch`. Triton works out anew at each launch what it
specialised on, dtypes, alignment and every number: 8 to 14 µs, more than a training step of a small model has for a
layer. A `Launch` whose tensors have the dtypes they had before, and all lie at multiples of 16 bytes, is the same
compiled kernel each time, and goes straight to it. (Not on AMD, where Triton looks at the size of a tensor's storage
too.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.device import INTERPRET

REMEMBERED = 1024
"""Plans of each launcher, of about 4 KB: every M of a server's batches is one more."""

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype: what of a tensor a plan may look at."""


def layout(t: Tensor) -> Layout:
    return t.shape, t.stride(), t.dtype


@overload
def layouts(ts: Sequence[Tensor]) -> tuple[Layout, ...]: ...
@overload
def layouts(ts: Sequence[Tensor | None]) -> tuple[Layout | None, ...]: ...
def layouts(ts: Sequence[Tensor | None]) -> tuple[Layout | None, ...]:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in ts])


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all lie at multiples of 16 bytes."""
    address = 0
    for t in tensors:
        address |= t.data_ptr()
    return address % 16 == 0


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's own GPU, and so on its current stream, whichever GPU is current for the caller."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def straight(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., object]:
    """compiled[grid], less what Triton makes of each launch for whoever watches them, as a profiler does, when nobody
    does: a record, and two calls of chains of hooks that are empty."""
    watched, run, function, metadata = compiled[grid], compiled.run, compiled.function, compiled.packed_metadata
    runtime = knobs.runtime

    def launch(*given: Any) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            watched(*given)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        run(*grid, stream, function, metadata, None, None, None, *given)

    return launch


class Launch:
    """kernel[grid](*descriptors, *tensors, *numbers, **constants, **options), all but the tensors, on one device.

    numbers: ints and floats, or tuples of them.   constants: the kernel's constexprs, in its order.   options: the
    compiler's.
    """

    __slots__ = "_known", "constants", "grid", "kernel", "numbers", "options"

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[Any, ...],
        options: dict[str, Any] | None = None,
        **constants: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.options = {"enable_fp_fusion": True} | (options or {})  # Triton 3.9 warns, 3.10 turns its default off
        self.constants = constants
        self._known: tuple[list[torch.dtype], Callable[..., object]] | None = None

    def __call__(
        self,
        tensors: tuple[Tensor | tuple[Tensor, ...], ...],
        descriptors: tuple[TensorDescriptor | None, ...] = (),
    ) -> None:
        """On the GPU of the tensors.   descriptors: their tensors are aligned, or they could not be."""
        flat = [t for each in tensors for t in (each if isinstance(each, tuple) else (each,))]
        with on_device(flat[0]):
            dtypes, lies_well = [t.dtype for t in flat], aligned(flat)
            known = self._known
            if known is not None and lies_well and dtypes == known[0]:
                known[1](*descriptors, *tensors, *self.numbers, *self.constants.values())
                return
            given = *descriptors, *tensors, *self.numbers
            compiled = self.kernel[self.grid](*given, **self.constants, **self.options)
            if lies_well and compiled is not None and not (INTERPRET or torch.version.hip):
                self._known = dtypes, straight(compiled, self.grid)
