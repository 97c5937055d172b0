"""Checked-in choices: the tile of every launch and *fused* or *split* for the main GEMM, per architecture.

tables/<arch>.json holds {"tiles": {kernel: [row, …]}, "strategy": [row, …]}; the first row whose bounds admit the shape
wins, and the last row of a list has none. An architecture without a file gets default.json: never an error. A folder
named by FASTLORA_TABLES is looked into first.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tile:
    """One launch configuration. shrink and x use BLOCK_M, BLOCK_K; dy a BLOCK_M or BLOCK_N output and BLOCK_K steps.

    BLOCK_R is the rank step of the GEMM's prologue; thin kernels hold up to 128 ranks at once. GROUP_M: how many blocks
    of a GEMM's rows are walked together, so that they share their columns of w in L2.
    tma: expand and dx in their persistent form, where the operands allow it; specialize: with warps for loads alone;
    flatten: with the loops over tiles and features as one, where the rank is one step; programs: on each processor.
    """

    BLOCK_M: int
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    num_warps: int = 4
    num_stages: int = 3
    BLOCK_R: int = 32
    GROUP_M: int = 16
    tma: bool = False
    specialize: bool = False
    flatten: bool = False
    programs: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


FOLDER = Path(__file__).with_name("tables")


@lru_cache(maxsize=None)
def table(arch: str) -> dict[str, Any]:
    """The table of `arch`, or default.json where there is none; "name" says which.

    Raises ValueError where FASTLORA_TABLES names no folder, or a file holds no table.
    """
    own = os.environ.get("FASTLORA_TABLES")
    if own and not Path(own).is_dir():
        raise ValueError(f"FASTLORA_TABLES: got {own!r}, wanted a folder of tables (<arch>.json)")
    folders = [Path(own), FOLDER] if own else [FOLDER]
    wanted = [folder / f"{arch}.json" for folder in folders] + [FOLDER / "default.json"]
    path = next(path for path in wanted if path.exists())
    try:
        held = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}), wanted a table") from error
    if not isinstance(held, dict) or not {"tiles", "strategy"} <= set(held):
        raise ValueError(f"{path}: not a table, wanted its tiles and its strategy")
    return {"name": path.stem, **held}


def admits(row: dict[str, Any], dtype: torch.dtype, **sizes: int) -> bool:
    """Whether a row takes these: its "dtype" lists dtypes, "min_N" and "max_N" bound N, "N" is N itself."""
    if "dtype" in row and _DTYPES[dtype] not in row["dtype"]:
        return False
    return all(
        row.get(f"min_{name}", size) <= row.get(name, size) == size <= row.get(f"max_{name}", size)
        for name, size in sizes.items()
    )


@lru_cache(maxsize=4096)
def tile(
    kernel: str, arch: str, dtype: torch.dtype, M: int, N: int, R: int = 0, tma: bool = True, masks: int = 0
) -> Tile:
    """The tile of `kernel` ("shrink", "expand", "add", "dy", "x", "dx") for an [M, N] operand or output, at rank R.

    tma: False passes over the tiles that need tensor descriptors.   masks: how many members of a group drop, for its
    dx ("group_dx"): from the second on, each needs an accumulator beside the tile's own.
    """
    for row in table(arch)["tiles"][kernel]:
        if admits(row, dtype, M=M, N=N, R=R, masks=masks) and (tma or not row["tile"].get("tma", False)):
            return Tile(**row["tile"])
    raise LookupError(f"table {arch}: no row of {kernel!r} admits {dtype}, M {M}, N {N}, R {R}; the last has bounds")


@lru_cache(maxsize=4096)
def strategy(
    arch: str, dtype: torch.dtype, M: int, N: int, K: int, R: int, kernel: str = "expand", masks: int = 0
) -> tuple[str, str]:
    """("fused" | "split", why) for the main GEMM [M, K]·[K, N] of `kernel`: a pure function of the arguments.

    kernel: "expand", where N is out features, "dx", where K is, or "group_dx", where K is all members'.   masks: how
    many of a dx's members drop.
    """
    chosen = table(arch)
    for row in chosen["strategy"]:
        if row.get("kernel", kernel) == kernel and admits(row, dtype, M=M, N=N, K=K, R=R, masks=masks):
            return row["strategy"], f"table {chosen['name']}, {row['source']}: {row['why']}"
    raise LookupError(f"table {arch}: no strategy of {kernel!r} admits {dtype}, M {M}, N {N}, K {K}, R {R}")
