"""warmup: run what a model calls its LoRA layers with ahead of time, so that no request pays for a compilation."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.dispatch import explain

log = logging.getLogger("fastlora")


class _Unit(NamedTuple):
    """What a model calls with one tensor: a layer, layers that run as a group, or a gated MLP.

    K: features of the tensor.   dtype: the tensor's.
    """

    name: str
    layers: list[Any]
    K: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(self.layers[0].parameters()).device

    def signature(self, M: int) -> tuple[object, ...]:
        """Units with equal signatures launch the same compiled kernels at M rows."""
        x = torch.empty(1, dtype=self.dtype, device=self.device).expand(M, self.K)
        return M, *((_signature(layer), str(explain(layer, x))) for layer in self.layers)


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """What of a layer its kernels are compiled for, beside the path that it takes."""
    tensors = [(t.shape, t.dtype, t.device, t.requires_grad, t.stride()) for t in layer.parameters()]
    own = getattr(layer, "lora_dropout", None)  # a LoRALinear's number; PEFT keeps modules there
    dropout = own if isinstance(own, float) else tuple(m.p for m in layer.modules() if isinstance(m, nn.Dropout))
    return type(layer), layer.training, dropout, *tensors


def _units(model: nn.Module) -> Iterator[_Unit]:
    """Every unit of the model once; the layers of a gated MLP, which calls them itself if it must, are part of it."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or not hasattr(module, "decide"):
            continue
        structure, siblings = getattr(module, "_structure", None), getattr(module, "_siblings", None)
        layers, reader = [module], module
        if structure is not None:
            seen.update(map(id, module.children()))
            reader = module.get_submodule(structure.gate)
        elif siblings is not None:
            layers = [layer for reference in siblings.layers if (layer := reference()) is not None]
            seen.update(map(id, layers))
            name += "".join(f", {layer._name.split('.')[-1]}" for layer in layers[1:])
        elif not hasattr(module, "in_features"):
            continue  # an MLP that was unpatched
        K = getattr(reader, "in_features", None) or len(reader.weight)  # Conv1D: [K, N]
        yield _Unit(name or type(module).__name__, layers, int(K), _input_dtype(reader))


def _input_dtype(layer: nn.Module) -> torch.dtype:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return weight.dtype
    return torch.get_default_dtype()


def warmup(model: nn.Module, rows: Iterable[int] = (1, 512, 8192)) -> dict[str, float]:
    """Compile what this model will need: each distinct LoRA layer, group of them and gated MLP runs on noise.

    As in evaluation, forward without gradients; where it trains, or is in train mode, also forward and backward as in
    training, for a first layer too, whose input needs no gradient.
    model: holds LoRALinear layers or is a patched PEFT model, already on its device.   rows: the row counts M ≥ 1 to
    prepare.   Gradients, modes and torch's random state are left as they were, and the layers' own hooks see nothing.
    Call it under autocast if the model will run under it.
    Shows progress on a terminal, logs it elsewhere.   Returns {"layer at M rows": seconds}; nothing compiles on the
    torch backend, so there it only runs.   Raises TypeError, ValueError: a model without such layers, or on the meta
    device, rows that are no row counts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    counts = _counts(rows)
    units = list(_units(model))
    if not units:
        raise ValueError("model: holds no fastlora layer; patch() it first, or build it of LoRALinear")
    for unit in units:
        if any(p.is_meta for layer in unit.layers for p in layer.parameters()):
            raise ValueError(f"model: got {unit.name} on the meta device, wanted parameters that have storage; load it")
    distinct: dict[tuple[object, ...], tuple[_Unit, int]] = {}
    for unit in units:
        for M in counts:
            distinct.setdefault(unit.signature(M), (unit, M))
    seconds: dict[str, float] = {}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        for done, (unit, M) in enumerate(distinct.values(), 1):
            label = f"{unit.name} at {M} rows"
            start = time.perf_counter()
            _run(unit, M)
            seconds[label] = time.perf_counter() - start
            _progress(done, len(distinct), label)
    return seconds


def _counts(rows: Any) -> list[int]:
    """The row counts as a list.   Raises TypeError, ValueError."""
    wanted = "wanted whole numbers ≥ 1, as (1, 512, 8192)"
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"rows: got {rows!r}, {wanted}")
    counts = list(rows)
    for M in counts:
        if isinstance(M, bool) or not isinstance(M, int):
            raise TypeError(f"rows: got {M!r} among {counts}, {wanted}")
        if M < 1:
            raise ValueError(f"rows: got {M} among {counts}, {wanted}")
    return counts


def _run(unit: _Unit, M: int) -> None:
    """The unit as a training step calls it, and as an evaluation does."""
    noise = torch.randn(M, unit.K, device=unit.device).to(unit.dtype)
    log.debug("warmup: %s: %s", unit.name, explain(unit.layers[0], noise))
    trained = [p for layer in unit.layers for p in layer.parameters() if p.requires_grad]
    through = bool(trained) or unit.layers[0].training  # a frozen layer may lie on the way to what is trained
    with _mode(unit.layers, training=True), torch.inference_mode(False), torch.enable_grad():
        if through:
            _step(unit, noise.clone().requires_grad_(), trained)
        if trained:
            _step(unit, noise.clone(), trained)
    with _mode(unit.layers, training=False):
        for without in (torch.no_grad(), torch.inference_mode()):  # in inference mode a group's layers run one by one
            with without:
                _forward(unit, noise.clone())
    if unit.device.type == "cuda":
        torch.cuda.synchronize(unit.device)


def _forward(unit: _Unit, x: Tensor) -> list[Tensor]:
    """By `forward` itself: hooks that a user set are not for noise. Siblings run as their caller would have them."""
    with ExitStack() as stack:
        for siblings in {getattr(module, "_siblings", None) for layer in unit.layers for module in layer.modules()}:
            if siblings is not None:
                stack.enter_context(siblings.called())
        return [layer.forward(x) for layer in unit.layers]


def _step(unit: _Unit, x: Tensor, trained: list[nn.Parameter]) -> None:
    ys = _forward(unit, x)
    leaves = [x, *trained] if x.requires_grad else trained
    torch.autograd.grad(ys, leaves, [torch.randn_like(y) for y in ys], allow_unused=True)


@contextmanager
def _mode(layers: list[nn.Module], training: bool) -> Iterator[None]:
    """Inside, the layers are in train or in eval mode; afterwards every module is in its own again."""
    before = [(module, module.training) for layer in layers for module in layer.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was in before:
            module.training = was


def _progress(done: int, total: int, label: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rfastlora warmup {done}/{total}: {label:<60.60}{end}")
        sys.stderr.flush()
    else:
        log.info("warmup %d/%d: %s", done, total, label)
