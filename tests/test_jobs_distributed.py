"""Two processes on a CPU: jobs under DDP and under FSDP2 per decoder layer have the gradients of both halves' mean."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from crews import CREW, State, crewed, fresh, ids, losses
from models import base_model
from processes import WORLD, each
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastlora import Jobs

pytestmark = pytest.mark.xdist_group("processes")  # which have imported once what they need

NAMES: list[str | None] = ["a", "c", "b", "a"]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(model: nn.Module, jobs: Jobs, batch: Tensor) -> State:
    for name in jobs.names:
        for p in jobs.parameters(name):
            p.grad = None
    with jobs.use(NAMES):
        sum(losses(model(input_ids=batch).logits, batch, NAMES).values()).backward()  # type: ignore[union-attr]
    return {
        f"{name} {number}": whole(p.grad).clone()
        for name in jobs.names
        for number, p in enumerate(jobs.parameters(name))
        if p.grad is not None
    }


def worker(rank: int) -> None:
    torch.manual_seed(0)
    model, batches = base_model("llama").train(), [ids(4) for _ in range(WORLD)]
    starts = {name: state for name, (_, state) in fresh(model).items()}
    halves = []
    for batch in batches:
        plain = copy.deepcopy(model)
        halves.append(gradients(plain, crewed(plain, starts), batch))
    wanted = {key: (halves[0][key] + halves[1][key]) / WORLD for key in halves[0]}
    for kind in ("ddp", "fsdp2"):
        ours = copy.deepcopy(model)
        jobs = crewed(ours, starts, CREW)
        wrapped: nn.Module = ours
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(ours)
        else:
            for layer in ours.model.layers:
                fully_shard(layer)
            fully_shard(ours)
        found = gradients(wrapped, jobs, batches[rank])
        assert found.keys() == wanted.keys()
        for key, t in found.items():
            torch.testing.assert_close(t, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()))
    layer = jobs.layers["model.layers.0.mlp.up_proj"]  # between steps its factors are shards, and it says so
    with layer.use_jobs(["a"]), pytest.raises(TypeError, match="got a DTensor, wanted a whole tensor"):
        layer(torch.randn(1, 3, 64))


def test_ddp_and_fsdp2_give_the_mean_of_the_halves(tmp_path: Path) -> None:
    each(worker, tmp_path)
