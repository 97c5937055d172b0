"""PEFT's own layers beside fastlora's, on one model: losses of the same training, time and memory of the same step.

Both sides share every tensor: `patch` and `unpatch` change the class of the LoRA layers and nothing else.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import fastlora

SIDES: dict[str, Callable[[PeftModel], Any]] = {"peft": fastlora.unpatch, "fastlora": fastlora.patch}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One training step: seconds of each run, bytes kept for backward beyond parameters and batch, peak above rest."""

    seconds: list[float]
    saved: int
    peak: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def ratio(found: dict[str, Step]) -> float:
    """Our time over PEFT's: the median over turns, in each of which both took the same batch."""
    turns = zip(found["fastlora"].seconds, found["peft"].seconds, strict=True)
    return statistics.median(ours / theirs for ours, theirs in turns)


def losses(model: PeftModel, train: Callable[[PeftModel], list[float]]) -> dict[str, list[float]]:
    """The losses of `train` with each side's layers, from the adapter as it is now; it is put back afterwards."""
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    found = {}
    for side, use in SIDES.items():
        use(model)
        found[side] = train(model)
        set_peft_model_state_dict(model, start)
    return found


def largest_gap(found: dict[str, list[float]]) -> float:
    """The largest relative difference between the two sides' losses at any step."""
    return max(abs(ours - theirs) / abs(theirs) for theirs, ours in zip(found["peft"], found["fastlora"], strict=True))


def steps(model: PeftModel, batches: Sequence[Batch], rounds: int) -> dict[str, Step]:
    """Time and memory of a step with each side's layers: interleaved, each going first in turn.

    The optimizer runs with a learning rate of zero, so the model is left as it was.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {side: [] for side in SIDES}
    order = list(SIDES)
    for turn in range(-1, rounds):  # the first turn warms up
        batch = batches[turn % len(batches)]
        for side in order:
            SIDES[side](model)
            step({key: value[:1] for key, value in batch.items()})  # a run changes sides once: that is not timed
            seconds = _seconds(step, batch)
            if turn >= 0:
                times[side].append(seconds)
        order.reverse()
    batch = max(batches, key=lambda b: b["input_ids"].numel())
    found = {}
    for side, use in SIDES.items():
        use(model)
        found[side] = Step(times[side], _saved(model, batch), peak(step, batch))
    return found


def _seconds(step: Callable[[Batch], None], batch: Batch) -> float:
    on_gpu = batch["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _saved(model: PeftModel, batch: Batch) -> int:
    """Bytes that a forward pass keeps for backward: each storage once, parameters, buffers and the batch left out."""
    own = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def peak(step: Callable[[Batch], None], batch: Batch) -> int:
    """The most that a step holds at once beyond what was held before: as the allocator of the device saw it."""
    if batch["input_ids"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # what earlier steps left in cycles is no part of this one, and would lower its level when it goes
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing on the process's stderr: the profiler's own library announces itself there."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
