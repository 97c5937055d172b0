"""warmup: run every distinct layer once ahead of time, so that no request pays for a compilation."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable

import torch
from torch import nn

from fastlora.dispatch import explain

log = logging.getLogger("fastlora")


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Layers with equal signatures launch the same compiled kernels."""
    tensors = [(t.shape, t.dtype, t.device, t.requires_grad, t.stride()) for t in layer.parameters()]
    dropout = tuple(m.p for m in layer.modules() if isinstance(m, nn.Dropout))
    return type(layer), layer.training, dropout, getattr(layer, "lora_dropout", None) if not dropout else None, *tensors


def _input_dtype(layer: nn.Module) -> torch.dtype:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point():
        return weight.dtype
    return torch.get_default_dtype()


def warmup(model: nn.Module, rows: Iterable[int] = (1, 512, 8192)) -> dict[str, float]:
    """Compile what this model will need: each distinct LoRA layer runs forward, and backward if it trains, on noise.

    model: holds LoRALinear layers or is a patched PEFT model, already on its device and in its train or eval mode.
    rows: the row counts M to prepare.   Gradients, and torch's random state, are left as they were.
    Shows progress on a terminal, logs it elsewhere.   Returns {"layer at M rows": seconds}; nothing compiles on the
    torch backend, so there it only runs.   Raises ValueError when the model has no such layer.
    """
    distinct: dict[tuple[object, ...], tuple[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "decide") and hasattr(layer, "in_features"):
            distinct.setdefault(_signature(layer), (name, layer))
    if not distinct:
        raise ValueError("model: holds no fastlora layer; patch() it first, or build it of LoRALinear")
    jobs = [(name, layer, M) for name, layer in distinct.values() for M in rows]
    seconds: dict[str, float] = {}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        for done, (name, layer, M) in enumerate(jobs, 1):
            label = f"{name or type(layer).__name__} at {M} rows"
            start = time.perf_counter()
            _run_once(layer, M)
            seconds[label] = time.perf_counter() - start
            _progress(done, len(jobs), label)
    return seconds


def _run_once(layer: nn.Module, M: int) -> None:
    trained = [p for p in layer.parameters() if p.requires_grad]
    device = next(layer.parameters()).device
    x = torch.randn(M, int(layer.in_features), device=device).to(_input_dtype(layer))  # type: ignore[arg-type]
    log.debug("warmup: %s", explain(layer, x))
    with torch.set_grad_enabled(bool(trained)):
        y = layer(x.requires_grad_(bool(trained)))
    if trained:
        torch.autograd.grad(y, [x, *trained], torch.randn_like(y), allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _progress(done: int, total: int, label: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rfastlora warmup {done}/{total}: {label:<60.60}{end}")
        sys.stderr.flush()
    else:
        log.info("warmup %d/%d: %s", done, total, label)
