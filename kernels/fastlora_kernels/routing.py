"""Which rows take which adapter, on the device: rows sorted by slot and cut into tiles of one adapter each.

Two launches that read the mapping and write fixed buffers: no host sync, no allocation, no atomics, so that a captured
CUDA graph replays with other adapters, more or fewer. All layers of a batch share one routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import Place, place
from fastlora_kernels.launch import REMEMBERED, Launch
from fastlora_kernels.sizes import cdiv, power_of_two

TILE_ROWS = 16
"""Rows of a tile, whatever the batch: a row's sums then run through the same instructions in any company."""

CHUNK = 1024


@triton.jit(do_not_specialize=["M"])
def _count_kernel(slot_ptr, count_ptr, M, CHUNK: tl.constexpr):
    slot = tl.program_id(0)
    found = tl.zeros([CHUNK], tl.int32)
    for m in tl.range(0, M, CHUNK):
        offs = m + tl.arange(0, CHUNK)
        found += (tl.load(slot_ptr + offs, mask=offs < M, other=-1) == slot).to(tl.int32)
    tl.store(count_ptr + slot, tl.sum(found, 0))


@triton.jit(do_not_specialize=["M", "tiles"])
def _route_kernel(
    slot_ptr,
    count_ptr,
    order_ptr,
    tile_ptr,
    M,
    G,
    tiles,
    TILE_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program g writes the rows of slot g in their order, and its tiles (slot, first, rows); the last one the tail."""
    slot = tl.program_id(0)
    offs_g = tl.arange(0, SLOTS)
    counts = tl.load(count_ptr + offs_g, mask=offs_g < G, other=0)
    cut = (counts + TILE_ROWS - 1) // TILE_ROWS
    before = offs_g < slot
    first_row = tl.sum(tl.where(before, counts, 0), 0)
    first_tile = tl.sum(tl.where(before, cut, 0), 0)
    mine = tl.sum(tl.where(offs_g == slot, counts, 0), 0)
    seen = first_row
    for m in tl.range(0, M, CHUNK):
        offs = m + tl.arange(0, CHUNK)
        hit = (tl.load(slot_ptr + offs, mask=offs < M, other=-1) == slot).to(tl.int32)
        tl.store(order_ptr + seen + tl.cumsum(hit, 0) - 1, offs, mask=hit != 0)
        seen += tl.sum(hit, 0)
    my_tiles = (mine + TILE_ROWS - 1) // TILE_ROWS
    for t in tl.range(0, my_tiles, CHUNK):
        offs = t + tl.arange(0, CHUNK)
        at = tile_ptr + 3 * (first_tile + offs)
        rows = tl.minimum(TILE_ROWS, mine - offs * TILE_ROWS)
        tl.store(at, tl.zeros([CHUNK], tl.int32) + slot, mask=offs < my_tiles)
        tl.store(at + 1, first_row + offs * TILE_ROWS, mask=offs < my_tiles)
        tl.store(at + 2, rows, mask=offs < my_tiles)
    if slot == G - 1:  # a shorter batch than the last leaves no stale tile behind
        for t in tl.range(first_tile + my_tiles, tiles, CHUNK):
            offs = t + tl.arange(0, CHUNK)
            tl.store(tile_ptr + 3 * offs + 2, tl.zeros([CHUNK], tl.int32), mask=offs < tiles)


@triton.jit
def first_of(count_ptr, slot, G, SLOTS: tl.constexpr):
    """Where the slot's rows begin in the order: how many rows the slots before it have."""
    offs_g = tl.arange(0, SLOTS)
    return tl.sum(tl.load(count_ptr + offs_g, mask=(offs_g < G) & (offs_g < slot), other=0), 0)


class Drops(NamedTuple):
    """Dropout of each slot's rows, which count from the slot's first: who else is in the batch moves no mask.

    seeds: [G] int64.   thresholds: [G] int32, 0 where nothing is dropped.
    """

    seeds: Tensor
    thresholds: Tensor


@dataclass(frozen=True)
class Routes:
    """Fixed buffers of a batch of M rows over G slots.

    order: [M] int32, rows sorted by slot, base rows left out.   tiles: [T, 3] int32, (slot, first in order, rows), at
    most TILE_ROWS rows each; 0 rows past the last tile.   counts: [G] int32.
    """

    order: Tensor
    tiles: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, M: int, G: int, device: torch.device | str) -> Routes:
        T = min(M, cdiv(M, TILE_ROWS) + G)
        order, tiles, counts = (torch.zeros(size, dtype=torch.int32, device=device) for size in (M + 1, 3 * T + 3, G))
        return cls(order[:M], tiles.view(-1, 3)[: max(T, 1)], counts)


@lru_cache(maxsize=REMEMBERED)
def _plan(at: Place, M: int, G: int, tiles: int) -> tuple[Launch, Launch]:
    count = Launch(_count_kernel, (G, 1, 1), (M,), CHUNK=CHUNK)
    return count, Launch(
        _route_kernel, (G, 1, 1), (M, G, tiles), TILE_ROWS=TILE_ROWS, SLOTS=power_of_two(G), CHUNK=CHUNK
    )


def route(slots: Tensor, routes: Routes) -> Routes:
    """Fill `routes` for the mapping.

    slots: [M] int32, contiguous, the slot of each row, −1 for base only; M and G as `routes` was made for.   Returns
    routes.
    """
    count, sort = _plan(place(slots), len(slots), len(routes.counts), len(routes.tiles))
    count((slots, routes.counts))
    sort((slots, routes.counts, routes.order, routes.tiles))
    return routes
