"""What is read twice and found in L2, by a model: a cache of 40 MiB that forgets what was used longest ago.

An H200 has 50 MiB and 132 processors. `ncu` measured there what the model gives for the kernels of that day: expand
445 MB for the model's 451, dy 93 MB for 98 (docs/gpu.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels import Tile
from fastlora_kernels.dy_pass import dh_parts, dy_bands
from fastlora_kernels.prologue import tile_at

PROCESSORS, M = 132, 8192


class L2:
    """missed: bytes that came from DRAM."""

    def __init__(self, size: int = 40 * 2**20) -> None:
        self.size, self.held, self.missed = size, 0, 0
        self.lines: OrderedDict[Hashable, int] = OrderedDict()

    def write(self, name: Hashable, size: int) -> None:
        self.held += size - self.lines.pop(name, 0)
        self.lines[name] = size
        while self.held > self.size:
            self.held -= self.lines.popitem(last=False)[1]

    def read(self, name: Hashable, size: int) -> None:
        self.missed += size * (name not in self.lines)
        self.write(name, size)


def dy_bytes(N: int, n_bands: int, rows: int, parts: int) -> int:
    """DRAM's bytes of a dy pass: three programs of 8 warps a processor side by side, each 64 × 64 of dy a turn."""
    l2, step = L2(), -(-N // parts // 64)
    todo: list[Iterator[tuple[int, int]]] = []
    for band in range(n_bands):
        down = range(band * rows // 64, min(M, (band + 1) * rows) // 64)
        across = [range(part * step, min(N // 64, (part + 1) * step)) for part in range(parts)]
        todo += [iter(list(product([m], part))) for m in down for part in across]  # dh
        todo += [iter(list(product(down, [n, n + 1]))) for n in range(0, N // 64, 2)]  # db
    running, waiting = todo[: 3 * PROCESSORS], iter(todo[3 * PROCESSORS :])
    while running:
        for program in list(running):
            at = next(program, None)
            if at is not None:
                l2.read(at, 64 * 64 * 2)
                continue
            running.remove(program)
            running += [other for other in [next(waiting, None)] if other is not None]
    return l2.missed


@pytest.mark.parametrize("N", [1024, 4096, 14336])
def test_dy_is_read_once(N: int) -> None:
    n_bands, rows = dy_bands(M, N, 16, 64)
    parts = dh_parts(M, [N], [16], n_bands * rows // 64, 64)
    assert dy_bytes(N, n_bands, rows, parts) <= 1.1 * 2 * M * N


def test_dy_as_it_was_when_an_h200_read_93_mb() -> None:
    assert dy_bytes(4096, 4, 2048, 2) == pytest.approx(93e6, rel=0.06)


@triton.jit
def _order(m_ptr, n_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    pid_m, pid_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    tl.store(m_ptr + tl.program_id(0), pid_m)
    tl.store(n_ptr + tl.program_id(0), pid_n)


def expand_bytes(N: int, K: int, group_m: int, device: str) -> int:
    """DRAM's bytes of a GEMM in tiles of 128 × 256, one a processor, that walk the features side by side."""
    tiles = M // 128 * (N // 256)
    at: Tensor = torch.empty(2, tiles, dtype=torch.int32, device=device)
    _order[(tiles,)](at[0], at[1], M, N, BLOCK_M=128, BLOCK_N=256, GROUP_M=group_m)
    order, l2 = at.t().tolist(), L2()
    for first in range(0, tiles, PROCESSORS):
        wave = order[first : first + PROCESSORS]
        for k in range(0, K, 64):
            for m in {m for m, _ in wave}:
                l2.read(("x", m, k), 128 * 64 * 2)
            for n in {n for _, n in wave}:
                l2.read(("w", n, k), 256 * 64 * 2)
        for m, n in wave:
            l2.write(("y", m, n), 128 * 256 * 2)
    return l2.missed + 2 * M * N


def test_expand_as_it_was_when_an_h200_moved_445_mb(device: str) -> None:
    assert expand_bytes(4096, 4096, 8, device) == pytest.approx(445e6, rel=0.02)


@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_blocks_of_rows_are_walked_in_squares(N: int, K: int, device: str) -> None:
    """16 × 128 rows beside 8 × 256 columns: an eighth to a fifth fewer bytes than 8 blocks of rows beside 16."""
    best = Tile(128).GROUP_M  # unless a table says otherwise, by a GPU's clock
    assert expand_bytes(N, K, best, device) <= 0.86 * expand_bytes(N, K, 8, device)
