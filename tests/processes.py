"""Two processes on a CPU, forked from one that has imported what both need: 12 s each, here once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2


def _worker(rank: int, rendezvous: str, work: Callable[[int], None]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    work(rank)
    dist.destroy_process_group()


def each(work: Callable[[int], None], folder: Path) -> None:
    """Run `work(rank)` in each process of a group; what one raises is raised here."""
    multiprocessing.set_forkserver_preload(["peft", "torch.distributed.fsdp", "torch.testing"])
    torch.multiprocessing.start_processes(
        _worker, args=(str(folder / "rendezvous"), work), nprocs=WORLD, start_method="forkserver"
    )
