"""Many adapters in one launch: the routing, the kernels against their twins and float64, who may influence whom."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from operands import bf16, fp16, fp32, lay
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Routes, Tile
from fastlora_kernels.multi import SPLIT
from fastlora_kernels.routing import TILE_ROWS
from fastlora_kernels.tables import table

MIXES = {"fp32": (fp32, fp32), "fp16": (fp16, fp16), "bf16": (bf16, bf16), "bf16+fp32": (bf16, fp32)}
SHRINK, EXPAND = Tile(16, BLOCK_K=64, BLOCK_R=16, num_stages=1), Tile(16, BLOCK_N=32, BLOCK_R=16, num_stages=1)
RANKS = (1, 4, 7, 16, 64, 256)


@dataclass(frozen=True)
class Group:
    """Layers that share x, pools with NaN between the adapters, and the mapping of a batch."""

    x: Tensor
    a_pool: Tensor
    b_pools: list[Tensor]
    ys: list[Tensor]
    start: Tensor
    rank: Tensor
    scaling: Tensor
    biased: Tensor
    slots: Tensor

    @property
    def width(self) -> int:
        return int(self.rank.max())

    def double(self) -> Group:
        wide = {name: [t.double() for t in getattr(self, name)] for name in ("b_pools", "ys")}
        return replace(self, x=self.x.double(), a_pool=self.a_pool.double(), scaling=self.scaling.double(), **wide)


def group(
    slots: list[int], mix: str = "fp32", device: str = "cpu", ranks: tuple[int, ...] = RANKS, K: int = 70,
    outs: tuple[int, ...] = (51, 33, 40),
) -> Group:  # fmt: skip
    """Adapter g lies behind a gap of NaN rows; the second layer lacks adapter 0, and every third has a lora_bias."""
    main, adapter = MIXES[mix]
    members, G, M = len(outs), len(ranks), len(slots)
    start, free = [], 2
    for r in ranks:
        start.append(free)
        free += r + 3

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return lay((torch.randn(shape) * std).to(device, dtype))

    a_pool = torch.full((members, free, K), float("nan"), dtype=adapter, device=device)
    b_pools = [torch.full((free, N), float("nan"), dtype=adapter, device=device) for N in outs]
    rank = torch.tensor([ranks] * members, dtype=torch.int32)
    rank[min(1, members - 1), 0] = 0
    biased = torch.tensor([[int(g % 3 == 1) for g in range(G)]] * members, dtype=torch.int32)
    for g, r in enumerate(ranks):
        rows = slice(start[g], start[g] + r)
        a_pool[:, rows] = normal(members, r, K, dtype=adapter, std=K**-0.5)
        for member, b_pool in enumerate(b_pools):
            b_pool[rows] = normal(r, outs[member], dtype=adapter, std=r**-0.5)
            if biased[member, g]:
                b_pool[rows.stop] = normal(outs[member], dtype=adapter)
    return Group(
        normal(M, K, dtype=main), a_pool, b_pools, [normal(M, N, dtype=main) for N in outs],
        torch.tensor(start, dtype=torch.int32, device=device), rank.to(device),
        (torch.rand(members, G) + 0.5).to(device), biased.to(device),
        torch.tensor(slots, dtype=torch.int32, device=device),
    )  # fmt: skip


def routed(g: Group) -> Routes:
    return kernels.route(g.slots, Routes.empty(len(g.slots), len(g.start), g.x.device))


def launched(g: Group, routes: Routes | None = None) -> list[Tensor]:
    """The group's outputs by the kernels."""
    routes = routes or routed(g)
    ys = [lay(y) for y in g.ys]
    h = kernels.multi_shrink(g.x, g.a_pool, g.start, g.rank, g.width, routes, config=SHRINK)
    kernels.multi_expand(ys, h, g.b_pools, g.start, g.rank, g.scaling, g.biased, routes, config=EXPAND)
    return ys


def fused(g: Group, w: list[Tensor], bias: Tensor | None, config: Tile) -> list[Tensor]:
    """The group's layers with their matmuls in the same launch."""
    h = kernels.multi_shrink(g.x, g.a_pool, g.start, g.rank, g.width, routed(g), config=SHRINK)
    layers = zip(w, g.b_pools, g.rank, g.scaling, g.biased, h.unbind(1), strict=True)
    return [
        kernels.multi_linear(g.x, w, bias, part, b_pool, g.start, rank, scaling, biased, g.slots, config=config)
        for w, b_pool, rank, scaling, biased, part in layers
    ]


def twin(g: Group) -> list[Tensor]:
    h = reference.multi_shrink(g.x, g.a_pool, g.start, g.rank, g.width, g.slots)
    return reference.multi_expand(g.ys, h, g.b_pools, g.start, g.rank, g.scaling, g.biased, g.slots)


def plain(g: Group) -> list[Tensor]:
    """PEFT's formulation, row by row: the branch in the adapter's dtype, added to y in the wider one."""
    out = [y.clone() for y in g.ys]
    for row, slot in enumerate(g.slots.tolist()):
        for member, y in enumerate(out):
            r = int(g.rank[member, slot]) if slot >= 0 else 0
            if r == 0:
                continue
            rows = slice(int(g.start[slot]), int(g.start[slot]) + r)
            update = (g.x[row].to(g.a_pool.dtype) @ g.a_pool[member, rows].t()) @ g.b_pools[member][rows]
            if g.biased[member, slot]:
                update = update + g.b_pools[member][rows.stop]
            y[row] = (y[row] + update * g.scaling[member, slot].to(update.dtype)).to(y.dtype)
    return out


def uneven(M: int) -> list[int]:
    """Rows of every adapter and of none, in no order, most of them of adapter 2."""
    return [(2, -1, 0, 2, 5, 2, 1, 2, 3, 4, 2)[i % 11] for i in range(M)]


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_batch(mix: str, device: str, poison: None) -> None:
    g = group(uneven(70), mix, device)
    for ours, usual, exact in zip(launched(g), plain(g), twin(g.double()), strict=True):
        mine = g.slots >= 0
        assert_close(ours[mine], usual[mine], exact[mine], mix)
        assert_same(ours[~mine], usual[~mine])


@pytest.mark.parametrize("outs", [(51,), (51, 33)], ids=len)
def test_one_and_two_layers(outs: tuple[int, ...], device: str, poison: None) -> None:
    g = group(uneven(20), "fp32", device, outs=outs)
    for ours, usual, exact in zip(launched(g), plain(g), twin(g.double()), strict=True):
        assert_close(ours, usual, exact)


def test_a_long_input_is_summed_from_parts(device: str, poison: None) -> None:
    g = group([0, 3, -1, 3], "fp32", device, ranks=(3, 5, 16, 20), K=2 * SPLIT + 30, outs=(40,))
    assert kernels.multi_shrink(g.x, g.a_pool, g.start, g.rank, g.width, routed(g), config=SHRINK).shape[0] == 3
    for ours, usual, exact in zip(launched(g), plain(g), twin(g.double()), strict=True):
        assert_close(ours, usual, exact)


@pytest.mark.parametrize("mix", MIXES)
def test_the_matmul_in_the_same_launch(mix: str, device: str, poison: None) -> None:
    """Against the base's product and the update, in float64; more rows than one tile has, of all adapters and none."""
    g = group(uneven(21), mix, device, outs=(40,))
    w, bias = lay(torch.randn(40, 70).to(device, g.x.dtype) / 70**0.5), lay(torch.randn(40).to(device, g.x.dtype))
    exact, usual = g.double(), torch.nn.functional.linear(g.x, w, bias)
    exact = replace(exact, ys=[torch.nn.functional.linear(exact.x, w.double(), bias.double())])
    (wanted,), (plainly,) = twin(exact), plain(replace(g, ys=[usual]))
    for layout in (w, lay(w.t().contiguous()).t()):
        (ours,) = fused(g, [layout], bias, Tile(16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, num_stages=1))
        assert_close(ours, plainly, wanted, mix)


MAPPINGS = {
    "mixed": uneven(100),
    "one adapter, many rows": [3] * 50,
    "one row each": [0, 1, 2, 3, 4, 5],
    "base only": [-1] * 9,
    "one row": [2],
    "more than a chunk": uneven(2100),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_routes(name: str, device: str) -> None:
    """Every mapped row is in one tile of its own slot, in order; tiles are full but for a slot's last."""
    mapping = MAPPINGS[name]
    slots = torch.tensor(mapping, dtype=torch.int32, device=device)
    routes = kernels.route(slots, Routes.empty(len(mapping), len(RANKS), device))
    found: dict[int, list[int]] = {}
    for slot, first, rows in routes.tiles.tolist():
        assert 0 <= rows <= TILE_ROWS
        if rows:
            assert len(found.get(slot, [])) % TILE_ROWS == 0, "only a slot's last tile may be short"
            found.setdefault(slot, []).extend(routes.order[first : first + rows].tolist())
    wanted = {slot: [row for row, s in enumerate(mapping) if s == slot] for slot in sorted(set(mapping)) if slot >= 0}
    assert found == wanted


def test_a_shorter_batch_leaves_no_stale_tail(device: str) -> None:
    """The same buffers routed again: what a longer or busier batch left there is gone."""
    buffers = Routes.empty(100, len(RANKS), device)
    kernels.route(torch.tensor(uneven(100), dtype=torch.int32, device=device), buffers)
    addresses = [t.data_ptr() for t in (buffers.order, buffers.tiles, buffers.counts)]
    few = torch.tensor([-1] * 97 + [4, 1, 4], dtype=torch.int32, device=device)
    kernels.route(few, buffers)
    assert [t.data_ptr() for t in (buffers.order, buffers.tiles, buffers.counts)] == addresses
    assert [line for line in buffers.tiles.tolist() if line[2]] == [[1, 0, 1], [4, 1, 2]]
    g = group(few.tolist(), device=device)
    for ours, fresh in zip(launched(g, buffers), launched(g), strict=True):
        assert_same(ours, fresh)


def test_a_row_does_not_depend_on_its_company(device: str) -> None:
    """Bit for bit: alone, permuted, among other adapters and in a longer batch; base rows to the base's own bits."""
    g = group(uneven(60), "bf16+fp32", device)
    whole = launched(g)
    for row in (0, 1, 4, 33):
        alone = replace(g, x=g.x[row : row + 1], ys=[y[row : row + 1] for y in g.ys], slots=g.slots[row : row + 1])
        for ours, all_rows in zip(launched(alone), whole, strict=True):
            assert_same(ours[0], all_rows[row])
    order = torch.randperm(60, device=device)
    shuffled = replace(g, x=g.x[order], ys=[y[order] for y in g.ys], slots=g.slots[order])
    for ours, all_rows in zip(launched(shuffled), whole, strict=True):
        assert_same(ours, all_rows[order])
    assert_same(whole[0][g.slots < 0], g.ys[0][g.slots < 0])


def test_strided_operands(device: str, poison: None) -> None:
    """x under other strides, and y with padded rows: the same bits."""
    g = group(uneven(20), "fp32", device)
    strided = replace(g, x=lay(g.x.t().contiguous()).t())
    whole = launched(g)
    for ours, expected in zip(launched(strided), whole, strict=True):
        assert_same(ours, expected)
    routes = routed(g)
    h = kernels.multi_shrink(g.x, g.a_pool, g.start, g.rank, g.width, routes, config=SHRINK)
    padded = [lay(torch.nn.functional.pad(y, (0, 5), value=float("nan")))[:, :-5] for y in g.ys]
    kernels.multi_expand(padded, h, g.b_pools, g.start, g.rank, g.scaling, g.biased, routes, config=EXPAND)
    for ours, expected in zip(padded, whole, strict=True):
        assert_same(ours, expected)


def test_an_empty_batch(device: str) -> None:
    assert [y.shape for y in launched(group([], device=device))] == [(0, 51), (0, 33), (0, 40)]


def test_a_deleted_slot_is_base_only(device: str) -> None:
    """A mapping that still names a slot whose ranks are 0: its rows are the base's, to the bit."""
    g = group(uneven(30), device=device)
    gone = replace(g, rank=torch.where(torch.arange(len(RANKS), device=device) == 2, 0, g.rank))
    for ours, base, before in zip(launched(gone), g.ys, launched(g), strict=True):
        assert_same(ours[g.slots == 2], base[g.slots == 2])
        assert_same(ours[g.slots != 2], before[g.slots != 2])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "default", "interpreter"])
@pytest.mark.parametrize("kernel", ["multi_shrink", "multi_expand", "multi_linear"])
def test_tiles_do_not_depend_on_the_batch(arch: str, kernel: str) -> None:
    assert not any("max_M" in row or "M" in row or "max_R" in row for row in table(arch)["tiles"][kernel])


def test_the_ops_pass_opcheck(device: str) -> None:
    g = group(uneven(7), "fp32", device, ranks=(2, 3, 4, 5, 6, 7), K=32, outs=(24, 16))
    clean = replace(g, a_pool=g.a_pool.nan_to_num(), b_pools=[b.nan_to_num() for b in g.b_pools])
    routes = routed(clean)
    tables = clean.start, clean.rank, clean.scaling, clean.biased
    buffers = routes.order, routes.tiles, routes.counts
    x, pools = clean.x, (clean.a_pool, clean.b_pools)
    torch.library.opcheck(torch.ops.fastlora.multi_update_.default, (clean.ys, x, *pools, *tables, *buffers, g.width))
    ws = [torch.randn(24, 32, device=device), torch.randn(16, 32, device=device)]
    biases = [None, torch.randn(16, device=device)]
    inputs = (x, ws, biases, *pools, *tables, clean.slots, *buffers, g.width)
    torch.library.opcheck(torch.ops.fastlora.multi_linear.default, inputs)
