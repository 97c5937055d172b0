"""Which path an op takes, and why, as a value one can print."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlora import ops

log = logging.getLogger("fastlora")

BACKENDS = ("triton", "torch")

FEW_ROWS = 16
"""M up to which a layer on a GPU runs on torch, unless something drops or the kernels are asked for: the arithmetic is
the same few µs, and three calls into torch took 50 µs of the host beside an H200, ours 216 (two thirds of it since)."""


_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _switch(variable: str) -> bool:
    """Whether an environment variable says on; unset is off.   Raises ValueError for any other word."""
    said = os.environ.get(variable, "")
    if said.lower() not in _ON + _OFF:
        raise ValueError(f"{variable}: got {said!r}, wanted one of {_ON} (on) or {_OFF} (off)")
    return said.lower() in _ON


@dataclass
class Environment:
    """What the user said from outside, read once at import.

    backend: FASTLORA_BACKEND, "triton" | "torch" | None (decide).   strict: FASTLORA_STRICT=1, a fallback is an error.
    disable: FASTLORA_DISABLE=1, patched layers run PEFT's own forward and the functional ops run on torch.
    """

    backend: str | None = field(default_factory=lambda: os.environ.get("FASTLORA_BACKEND") or None)
    strict: bool = field(default_factory=lambda: _switch("FASTLORA_STRICT"))
    disable: bool = field(default_factory=lambda: _switch("FASTLORA_DISABLE"))

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"FASTLORA_BACKEND: got {self.backend!r}, wanted one of {BACKENDS}")


env = Environment()


@dataclass(frozen=True)
class Decision:
    """One op's path: `path` runs it by `strategy` with `tile`, because of `why`.

    path: "triton", "torch", "layers" (a gated MLP, layer by layer) or "peft" (PEFT's own forward).
    strategy: "fused" (one GEMM with the low-rank prologue), "split" (the base's GEMM, and a launch for the term).
    tile: the launch configuration.   Both are None off Triton.
    """

    path: str
    strategy: str | None
    tile: dict[str, int] | None
    why: str

    def __str__(self) -> str:
        parts = [self.path, self.strategy or "", str(self.tile) if self.tile else "", f"({self.why})"]
        return " ".join(part for part in parts if part)


def backend_of(x: Tensor, asked: str | None = None) -> str:
    """ "triton" or "torch" for an op on x.   asked: the caller's `backend`; FASTLORA_BACKEND stands in for None.

    Raises ValueError for an unknown name, RuntimeError when "triton" is demanded where it cannot run.
    """
    asked = asked or ("torch" if env.disable else env.backend)
    if asked == "torch":
        return "torch"
    if asked is None:
        return "triton" if x.is_cuda and ops.triton_unavailable(x) is None else "torch"
    if asked != "triton":
        raise ValueError(f"backend: got {asked!r}, wanted one of {BACKENDS} or None")
    reason = ops.triton_unavailable(x)
    if reason is not None:
        raise RuntimeError(
            f"backend: 'triton' was asked for, and {reason}; on a CPU set TRITON_INTERPRET=1 before import"
        )
    return "triton"


def few_rows(x: Tensor) -> bool:
    """Whether calls cost more than arithmetic on x: [..., K]."""
    if x.is_cpu:
        return x.numel() <= ops.FEW_INPUTS
    return x.numel() <= FEW_ROWS * x.shape[-1]


def backend_for(x: Tensor, asked: str | None = None, drops: bool = False) -> str:
    """`backend_of` for layers with one adapter each: torch for few rows on a GPU.

    drops: whether dropout is on, whose mask is the kernels'.   A traced graph does not choose: M would be a guard.
    """
    if x.is_cpu and asked is None and env.backend is None:  # the usual case, past three more questions
        return "torch"
    where = backend_of(x, asked)
    chosen = asked or env.backend or drops or where == "torch" or not x.is_cuda
    return where if chosen or torch.compiler.is_compiling() or not few_rows(x) else "torch"


def decide(
    x: Tensor, N: int, R: int, asked: str | None = None, dtype: torch.dtype | None = None, drops: bool = False
) -> Decision:
    """How a LoRA layer of N out features and rank R takes x: [..., K].

    dtype: the GEMM's, x's unless autocast.   drops: whether dropout is on.
    """
    backend, main = backend_for(x, asked, drops), dtype or x.dtype
    if backend == "torch":
        if asked == "torch":
            why = "backend='torch' was asked for"
        elif env.disable or env.backend == "torch":
            why = "FASTLORA_DISABLE=1" if env.disable else "FASTLORA_BACKEND=torch"
        else:
            usual = "few rows: calls cost more than arithmetic" if x.is_cuda else "CPU tensors run on torch"
            why = ops.triton_unavailable(x) or f"{usual} unless backend='triton' is asked for"
        if x.is_cpu and not ops.has_matmul(main):
            why += f"; large products run in fp32, for this CPU has no matmul of {str(main).removeprefix('torch.')}"
        return Decision("torch", None, None, why)
    return main_gemm("expand", x, N, x.shape[-1], R, dtype=main)


def main_gemm(
    kernel: str, x: Tensor, N: int, K: int, R: int, members: int = 1, dtype: torch.dtype | None = None
) -> Decision:
    """How the kernels run the main GEMM [M, members·K]·[members·K, N] for the rows of x, in `dtype` (x's if None).

    kernel: "expand", "dx" (K is out features, N in features), or "group_dx".   R: the rank of each member.
    """
    main, arch, M = dtype or x.dtype, ops.kernels.arch(x), x.numel() // max(x.shape[-1], 1)
    strategy, why = ops.kernels.strategy(arch, main, M, N, members * K, members * R, kernel)
    split = "group_add" if kernel == "group_dx" else "add"
    tma = K % 8 == 0 and N % 8 == 0  # rows of 16 bytes, as tensor descriptors need them
    tile = asdict(ops.kernels.tile(kernel if strategy == "fused" else split, arch, main, M, N, R, tma=tma))
    return Decision("triton", strategy, tile, why)


def low_rank(kernel: str, x: Tensor, N: int, R: int = 0) -> Decision:
    """How the kernels add low-rank terms alone to an [M, N] that is there: "add", or one of the ops for many adapters.

    Or, as "multi_linear", with the base's own GEMM for few rows.
    """
    tile = asdict(ops.kernels.tile(kernel, ops.kernels.arch(x), x.dtype, x.shape[:-1].numel(), N, R))
    if kernel == "multi_linear":
        return Decision("triton", "fused", tile, "as many rows as the bank's fused_rows allow, and no gradients")
    return Decision("triton", "split", tile, "the base's product comes from elsewhere, and the terms land on it")


def explain(layer: Any, x: Tensor) -> Decision:
    """What `layer` (a LoRALinear; a layer or gated MLP that was patched) would do with x, and why; runs nothing.

    Raises TypeError, ValueError for a layer of another kind, and for an x: [..., K] that the layer would refuse.
    """
    decide_for = getattr(layer, "decide", None)
    if decide_for is None:
        raise TypeError(f"layer: got {type(layer).__name__}, wanted a fastlora.LoRALinear, or a patched layer or MLP")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a torch.Tensor")
    if x.dim() == 0:
        raise ValueError("x: got a 0-d tensor, wanted [..., K]")
    decision: Decision = decide_for(x)
    return decision


_told: set[str] = set()


def fell_back(where: str, reason: str, strict: bool = False) -> None:
    """Say, once per reason, that `where` runs PEFT's own forward; under strict raise instead."""
    if strict or env.strict:
        raise RuntimeError(f"{where}: strict mode forbids a fallback, and this one would run: {reason}")
    if reason not in _told:
        _told.add(reason)
        log.warning("%s falls back to PEFT's own forward: %s (said once per reason)", where, reason)
