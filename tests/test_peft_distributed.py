"""Two processes on a CPU: DDP and FSDP2 of a patched model train as PEFT's does, and shards are left to PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gating import gated_calls
from grouping import group_calls
from models import batch, counted, lora_layers, peft_model, step
from processes import WORLD, each
from tolerance import assert_all_close
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora import ops
from fastlora.peft import why_not

pytestmark = pytest.mark.xdist_group("processes")  # which have imported once what they need

DRAWS = 8
"""The logarithm of one draw's ratio scatters by a quarter, and now and then by one."""


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss on this process's row, and the gradients averaged over processes."""
    results = step(model, inputs)
    return {name.replace("module.", ""): whole(value) for name, value in results.items() if name != "logits"}


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2_of_leaves(model: nn.Module) -> nn.Module:
    """Some layers, or what they are made of, units of their own, gathered when they are called and not by siblings."""
    for name, layer in lora_layers(model).items():
        if "k_proj" in name or "up_proj" in name:
            fully_shard(layer if "k_proj" in name else layer.base_layer)
    return fully_shard(model)


def worker(rank: int) -> None:
    one_by_one = ops.FEW_INPUTS
    for few, mlps in ((one_by_one, False), (0, False), (0, True)):  # one by one, in groups, MLPs as one
        ops.FEW_INPUTS = few
        train_as_peft_does(rank, few, mlps)


def train_as_peft_does(rank: int, few: int, mlps: bool) -> None:
    for wrap in (ddp, fsdp2) if few else (ddp, fsdp2, fsdp2_of_leaves):
        draws = []
        for seed in range(2 if few else DRAWS):
            torch.manual_seed(seed)
            model, inputs = peft_model("llama", layers=1), batch(rows=WORLD)
            mine = {name: value[rank : rank + 1] for name, value in inputs.items()}
            ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
            report = fastlora.patch(ours, strict=wrap is not fsdp2_of_leaves, gated=mlps)
            leaves = 2 if wrap is fsdp2_of_leaves else 0  # which PEFT's forward runs, and their siblings one by one
            groups = [] if few or leaves else report.groups
            if mlps and not leaves:  # their gate and up are no group of their own, nor is down a layer
                groups = [group for group in groups if "mlp" not in group[0]]
            ours = wrap(ours)
            with counted() as calls, group_calls() as in_groups, gated_calls() as as_one:
                actual = gradients(ours, mine)
            in_mlps = 3 * as_one.call_count
            assert as_one.call_count == (len(report.gated) if mlps and not leaves else 0)
            assert calls == (len(report.patched) - leaves - sum(map(len, groups)) - in_mlps, 0), calls
            assert in_groups.call_count == len(groups)
            draws.append((actual, gradients(wrap(model), mine), gradients(wrap(exact), mine)))
        assert_all_close(draws)
        if wrap is fsdp2:  # between steps, FSDP2's shards are DTensors
            layers = lora_layers(ours).values()
            assert all("DTensor, not a plain tensor" in str(why_not(layer)) for layer in layers)


def test_ddp_and_fsdp2_give_pefts_gradients(tmp_path: Path) -> None:
    """Strict, so nothing fell back: FSDP2 hands its layers whole weights during forward and backward."""
    each(worker, tmp_path)
