"""What every op stands on: the kernels where Triton is, and the library that the ops are defined in.

The only importer of fastlora_kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.eager.base import as_rows, batched

kernels: Any = None
if importlib.util.find_spec("triton") is not None:  # Linux only; the torch backend serves elsewhere
    import fastlora_kernels as kernels

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

lib = torch.library.Library("fastlora", "DEF")


def triton_unavailable(x: Tensor) -> str | None:
    """Why the Triton kernels cannot run on x; None when they can."""
    if kernels is None:
        return "triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the kernels take bf16, fp16 and fp32, not {x.dtype}"
    if x.device.type == "cuda" and not kernels.INTERPRET:
        return None
    if x.device.type == "cpu" and kernels.INTERPRET:
        return None
    return f"there is no Triton driver for device type {x.device.type!r}"


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [M, K], a view wherever the strides allow.

    Without the bit that says that its numbers are negated, as those of z.conj().imag are, and the gradient of a complex
    z's imaginary part where z.conj() was used: a kernel that reads its memory would read the other sign.
    """
    if x.is_neg():
        x = x.resolve_neg()
    return as_rows(x)


_as_new = torch.ops.aten._unsafe_view.default


def shaped(y: Tensor, *batch: int) -> Tensor:
    """[M, N] → [*batch, N], and no view: autograd forbids to change a view that an op returns, as relu_ does."""
    return y if len(batch) == 1 else _as_new(y, (*batch, y.shape[-1]))


def fake_h(x: Tensor, R: int) -> Tensor:
    """[M, R] like x: [..., K], in the dtype of h: what an op's fake gives for it."""
    M = 1
    for size in x.shape[:-1]:  # symbols, where a compiler traces
        M = M * size
    return x.new_empty((M, R), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def backend_of_many(backend: str, dys: Sequence[Tensor | None], drops: bool) -> str:
    """The backend of a backward: torch where a dy stands for many (is_grads_batched), which no kernel can read.

    Raises RuntimeError when interpreted kernels dropped something: torch's masks on a CPU are others.
    """
    many = next((dy for dy in dys if dy is not None and batched(dy)), None) if backend != "torch" else None
    if many is None:
        return backend
    if drops and many.is_cpu:
        raise RuntimeError(
            "fastlora: is_grads_batched, or a vectorized jacobian, came upon dropout of interpreted kernels; set p to "
            "0 or use the torch backend"
        )
    return "torch"


_AS_IT_IS = contextlib.nullcontext()


def plain(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: the operands already have the dtypes they are to be multiplied in."""
    device = "cpu" if x.is_cpu else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS
