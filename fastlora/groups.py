"""Layers that are called with the same tensor, found by running the model once on tensors without storage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

log = logging.getLogger("fastlora")


def siblings(model: nn.Module, layers: dict[str, nn.Module], together: int) -> list[list[str]]:
    """The names of `layers`, grouped: those called one after another with the same tensor, at most `together` of them.

    model: a Hugging Face model.   A model that cannot be traced leaves every layer by itself, and the log says why.
    """
    calls: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(**_inputs(model))
    except Exception as error:  # a model may do anything with a tensor that has no data
        log.info("fastlora: layers stay ungrouped: %s: %s", type(error).__name__, str(error).split("\n")[0])
        calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    groups = list(_runs(calls, layers, together))
    seen = {name for group in groups for name in group}
    return groups + [[name] for name in layers if name not in seen]


def _inputs(model: Any) -> dict[str, Tensor]:
    ids = torch.zeros((1, 4), dtype=torch.int64, device=getattr(model, "device", None))
    config = getattr(model, "config", None)
    return (
        {"input_ids": ids, "decoder_input_ids": ids}
        if getattr(config, "is_encoder_decoder", False)
        else {"input_ids": ids}
    )


def _runs(calls: list[tuple[str, Tensor]], layers: dict[str, nn.Module], together: int) -> Iterable[list[str]]:
    """Maximal runs of calls with one tensor.   A layer called more than once, or with layers of its own now and other
    layers then, stays by itself."""
    often = [name for name, _ in calls]
    run: list[str] = []
    held: Tensor | None = None
    for name, x in calls:
        alone = often.count(name) > 1
        if run and (x is not held or alone or len(run) == together):
            yield run
            run = []
        if alone:
            continue
        run, held = [*run, name], x
    if run:
        yield run
