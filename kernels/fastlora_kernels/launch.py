"""The one way from a launcher to its kernel: on the operands' own GPU, and with little Python the second time.

Triton works out anew at each launch what it specialised on, dtypes, alignment and every number: 8 to 14 µs, more than
a training step of a small model has for a layer. A launch whose numbers and dtypes were seen before, and whose tensors
all lie at multiples of 16 bytes, is the same compiled kernel, and goes straight to it. (Not on AMD, where Triton looks
at the size of a tensor's storage too.)
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels.device import INTERPRET

_MOST = 4096
"""Launches that are remembered: every M of a server's batches is one more."""

_seen: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's own GPU, and so on its current stream, whichever GPU is current for the caller."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | tuple[Tensor, ...], ...],
    numbers: tuple[Any, ...],
    descriptors: tuple[TensorDescriptor | None, ...] = (),
    options: dict[str, Any] | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*descriptors, *tensors, *numbers, **constants, **options) on the GPU of the tensors.

    numbers: ints and floats, or tuples of them; a parameter is always the one or the other, for 1 == 1.0.
    descriptors: their tensors are aligned, or they could not be.   constants: the kernel's constexprs, in its order.
    options: the compiler's.
    """
    options = options or {}
    given = *descriptors, *tensors, *numbers
    flat = [t for each in tensors for t in (each if isinstance(each, tuple) else (each,))]
    with on_device(flat[0]):
        if INTERPRET or torch.version.hip:
            kernel[grid](*given, **constants, **options)
            return
        address = 0
        for t in flat:
            address |= t.data_ptr()
        values = tuple(constants.values())
        described = [d and (d.base.dtype, *d.block_shape) for d in descriptors]
        what = id(kernel), flat[0].device.index, *options.values()
        key = *what, numbers, values, *described, *[t.dtype for t in flat]
        known = _seen.get(key) if address % 16 == 0 else None
        if known is not None:
            known[0][grid](*given, *values)
            return
        compiled = kernel[grid](*given, **constants, **options)
        if address % 16 == 0 and compiled is not None:
            if len(_seen) >= _MOST:
                _seen.clear()
            _seen[key] = compiled, kernel  # which lives as long as its id is a key
