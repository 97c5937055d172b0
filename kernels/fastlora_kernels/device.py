"""What a tensor lies on: the architecture whose table applies, its processors, and whether Triton interprets."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
"""True when TRITON_INTERPRET was set as Triton's kernels were first imported: they then run on CPU tensors."""


@lru_cache(maxsize=None)
def _cuda_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch(x: Tensor) -> str:
    """The table's name for x's device: "sm_90", "gfx942", …; "interpreter" for CPU tensors."""
    if x.device.type == "cuda":
        return _cuda_arch(x.device.index if x.device.index is not None else torch.cuda.current_device())
    return "interpreter"


@lru_cache(maxsize=None)
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """How many programs a persistent grid has on x's device; three where it is interpreted, so that they loop."""
    if x.device.type == "cuda":
        return _processors(x.device.index if x.device.index is not None else torch.cuda.current_device())
    return 3


class Place(NamedTuple):
    """All that a launch may depend on beside its operands' layouts and the tables, which are read once a process.

    precision: torch's setting for fp32 products.   processors: of a persistent grid.
    """

    device: torch.device
    precision: str
    arch: str
    processors: int


_places: dict[tuple[torch.device, str], Place] = {}
_by_backend: list[bool] = []
"""Whether somebody set torch.backends.….fp32_precision, as Trainer does for tf32: torch then refuses to say its older
setting, and a refusal takes 7 µs."""


def _precision() -> str:
    """torch's setting for fp32 products, in the words of torch.set_float32_matmul_precision."""
    if not _by_backend:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            _by_backend.append(True)
    return {"tf32": "high", "bf16": "medium"}.get(torch.backends.cuda.matmul.fp32_precision, "highest")


def place(x: Tensor) -> Place:
    """Where x lies."""
    key = x.device, _precision()
    found = _places.get(key)
    if found is None:
        found = _places[key] = Place(*key, arch(x), processors(x))
    return found
