"""What the kernel tests multiply: fresh random tensors in every dtype mix and layout, lying in NaN.

A kernel that reads one element too many meets a NaN, and says so in its result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROUND = 512

Mix = tuple[torch.dtype, torch.dtype, torch.dtype]
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16

MAIN_MIXES: dict[str, Mix] = {  # dtypes of x, w and dy; of a; of b
    "fp32": (fp32, fp32, fp32),
    "fp16": (fp16, fp16, fp16),
    "bf16": (bf16, bf16, bf16),
    "bf16+fp32": (bf16, fp32, fp32),
}
ODD_MIXES: dict[str, Mix] = {
    "fp16+fp32": (fp16, fp32, fp32),
    "fp32+bf16": (fp32, bf16, bf16),
    "fp16+bf16": (fp16, bf16, bf16),
    "bf16+bf16,fp32": (bf16, bf16, fp32),
    "bf16+fp32,fp16": (bf16, fp32, fp16),
}
MIXES = {**MAIN_MIXES, **ODD_MIXES}


def lay(t: Tensor) -> Tensor:
    """t's values, contiguous, in the middle of a storage that is NaN elsewhere."""
    ground = torch.full((t.numel() + 2 * GROUND,), float("nan"), dtype=t.dtype, device=t.device)
    here = ground[GROUND : GROUND + t.numel()].view(t.shape)
    return here.copy_(t)


def normal(*shape: int, dtype: torch.dtype = fp32, device: str = "cpu", std: float = 1.0) -> Tensor:
    """N(0, std²), rounded to dtype, lying in NaN."""
    return lay((torch.randn(shape) * std).to(dtype).to(device))


def _stepped(t: Tensor) -> Tensor:
    """Every second row and every third column of a tensor that is NaN elsewhere."""
    wide = torch.full([s * step for s, step in zip(t.shape, (2, 3), strict=True)], float("nan"), dtype=t.dtype)
    here = wide.to(t.device)[::2, ::3]
    return here.copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: lay(t.t().contiguous()).t(),
    "stepped": _stepped,
    "padded": lambda t: lay(torch.nn.functional.pad(t, (0, 5), value=float("nan")))[:, :-5],
}
"""The same values under other strides."""
