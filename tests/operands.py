"""What the kernel tests multiply: one layer's operands, random, in any dtype mix and layout, lying in NaN.

A kernel that reads one element too many meets a NaN, and says so in its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastlora_kernels as kernels
from fastlora import eager, reference
from fastlora_kernels import Tile

GROUND = 512
SCALE = 1.7
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16

MAIN_MIXES = {  # dtypes of x, w and dy; of a; of b
    "fp32": (fp32, fp32, fp32),
    "fp16": (fp16, fp16, fp16),
    "bf16": (bf16, bf16, bf16),
    "bf16+fp32": (bf16, fp32, fp32),
}
ODD_MIXES = {
    "fp16+fp32": (fp16, fp32, fp32),
    "fp32+bf16": (fp32, bf16, bf16),
    "fp16+bf16": (fp16, bf16, bf16),
    "bf16+bf16,fp32": (bf16, bf16, fp32),
    "bf16+fp32,fp16": (bf16, fp32, fp16),
}
MIXES = {**MAIN_MIXES, **ODD_MIXES}


ACTS: dict[str, Callable[[Tensor], Tensor]] = {  # torch's own, not the twin's formulas
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


def lay(t: Tensor) -> Tensor:
    """t's values, contiguous, in the middle of a storage that is NaN elsewhere."""
    ground = torch.full((t.numel() + 2 * GROUND,), float("nan"), dtype=t.dtype, device=t.device)
    return ground[GROUND : GROUND + t.numel()].view(t.shape).copy_(t)


def _stepped(t: Tensor) -> Tensor:
    sizes = [size * step for size, step in zip(t.shape, (2, 3), strict=False)]
    ground = torch.full(sizes, float("nan"), dtype=t.dtype, device=t.device)
    return (ground[::2, ::3] if t.dim() == 2 else ground[::2]).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: lay(t.t().contiguous()).t(),
    "every second row, every third column": _stepped,
    "padded rows": lambda t: lay(F.pad(t, (0, 5), value=float("nan")))[..., :-5],
}
"""The same values under other strides."""


@dataclass(frozen=True)
class Layer:
    """The operands of every launch of one layer, each of unit size, so that no branch hides another's error."""

    x: Tensor
    w: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    lora_bias: Tensor
    h: Tensor
    dh: Tensor
    dy: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        return replace(self, **{f.name: change(getattr(self, f.name)) for f in fields(self)})


def layer(mix: str, R: int, device: str = "cpu", M: int = 45, K: int = 70, N: int = 51) -> Layer:
    """Fresh operands, each rounded to its dtype and lying in NaN. The default sizes are odd and several small tiles."""
    main, a, b = MIXES[mix]

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return lay((torch.randn(shape) * std).to(device, dtype))

    return Layer(
        x=normal(M, K, dtype=main),
        w=normal(N, K, dtype=main, std=max(K, 1) ** -0.5),
        bias=normal(N, dtype=main),
        a=normal(R, K, dtype=a, std=max(K, 1) ** -0.5),
        b=normal(N, R, dtype=b, std=R**-0.5),
        lora_bias=normal(N, dtype=b),
        h=normal(M, R, dtype=fp32),
        dh=normal(M, R, dtype=fp32, std=R**-0.5),
        dy=normal(M, N, dtype=main),
    )


def a_seed(device: str = "cpu") -> Tensor:
    return torch.tensor(-(2**62) - 12345, device=device)


def scaled_mask(seed: Tensor, M: int, K: int, p: float, backend: str) -> Tensor:
    """[M, K] float64, what a backend's dropout multiplies x by: 0 where the seed's mask drops, else 1/(1−p)."""
    if backend == "triton":
        keep = reference.dropout_mask(seed, M, K, p)
    else:
        keep = eager.drop(torch.ones(M, K, device=seed.device), seed, p, fp32)
    return keep.double() * reference.dropout_scale(p)


def small_tile(R: int) -> Tile:
    """Several tiles on each axis of the default sizes; the rank is walked in several steps from 33 on."""
    return Tile(32, 32, 32, BLOCK_R=128 if R > 128 else 32)


def double(value: Any) -> Any:
    """The float64 twin of an argument."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def launch_thin(t: Layer, config: Tile, p: float = 0.0) -> dict[str, Tensor]:
    """The launchers whose sums may be split: shrink, the dy pass and the x pass."""
    dh, db = kernels.dy_pass(t.dy, t.h, t.b, SCALE, config=config)
    assert dh is not None and db is not None
    seed = a_seed(t.x.device.type)
    return {
        "shrink": kernels.shrink(t.x, t.a, p=p, seed=seed, config=config),
        "dh": dh,
        "db": db,
        "da": kernels.x_pass(t.x, t.dh, t.a.dtype, p=p, seed=seed, config=config),
    }


def launch(t: Layer, config: Tile, p: float = 0.0) -> dict[str, Tensor]:
    """Each launcher once."""
    seed = a_seed(t.x.device.type)
    return {
        **launch_thin(t, config, p),
        "expand": kernels.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias, config=config),
        "add_expand": kernels.add_expand(t.dy, t.h, t.b, SCALE, t.lora_bias, config=config),
        "dx": kernels.dx(t.dy, t.w, t.dh, t.a, p=p, seed=seed, config=config),
        "low_rank": kernels.low_rank(t.h, t.b, SCALE, t.x.dtype, t.lora_bias, config=config),
        "low_rank_dx": kernels.low_rank_dx(t.dh, t.a, t.x.dtype, p=p, seed=seed, config=config),
    }


def twins(module: Any, t: Layer, p: float = 0.0) -> dict[str, Tensor]:
    """What `launch` gives, by the twins in `module`: `fastlora.reference` or `plain`."""
    seed = a_seed(t.x.device.type)
    dh, db = module.dy_pass(t.dy, t.h, t.b, SCALE)
    return {
        "shrink": module.shrink(t.x, t.a, p=p, seed=seed),
        "expand": module.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, t.lora_bias),
        "add_expand": module.add_expand(t.dy, t.h, t.b, SCALE, t.lora_bias),
        "dh": dh,
        "db": db,
        "da": module.x_pass(t.x, t.dh, t.a.dtype, p=p, seed=seed),
        "dx": module.dx(t.dy, t.w, t.dh, t.a, p=p, seed=seed),
        "low_rank": module.add_expand(torch.zeros_like(t.dy), t.h, t.b, SCALE, t.lora_bias, t.x.dtype),
        "low_rank_dx": module.dx(t.x, None, t.dh, t.a, p=p, seed=seed),
    }


def exact(t: Layer, p: float = 0.0) -> dict[str, Tensor]:
    """What `launch` gives, in float64."""
    return twins(reference, t.map(double), p)
