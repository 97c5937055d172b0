"""Two processes on a CPU: DDP and FSDP2 of a patched model train as PEFT's does, and shards are left to PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from models import batch, counted, lora_layers, peft_model, step
from tolerance import assert_all_close
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastlora
from fastlora.peft import why_not

WORLD = 2


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


def worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for wrap in (ddp, fsdp2):
        draws = []
        for seed in range(2):
            torch.manual_seed(seed)
            model, inputs = peft_model("llama"), batch(rows=WORLD)
            mine = {name: value[rank : rank + 1] for name, value in inputs.items()}
            ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
            report = fastlora.patch(ours, strict=True)
            ours = wrap(ours)
            with counted() as calls:
                actual = gradients(ours, mine)
            assert calls == (len(report.patched), 0), calls
            draws.append((actual, gradients(wrap(model), mine), gradients(wrap(exact), mine)))
        assert_all_close(draws)
    layers = lora_layers(ours).values()  # between steps, FSDP2's shards are DTensors
    assert all("DTensor, not a plain tensor" in str(why_not(layer)) for layer in layers)
    dist.destroy_process_group()


def test_ddp_and_fsdp2_give_pefts_gradients(tmp_path: Path) -> None:
    """Strict, so nothing fell back: FSDP2 hands its layers whole weights during forward and backward."""
    torch.multiprocessing.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD)
