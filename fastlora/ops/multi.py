"""Many adapters in one batch as opaque ops, over the Triton kernels alone: the torch backend gathers its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora.ops.library import kernels, lib, plain, rows_of, shaped

lib.define(
    "multi_update_(Tensor(a!)[] ys, Tensor x, Tensor a_pool, Tensor[] b_pools, Tensor start, Tensor rank, "
    "Tensor scaling, Tensor biased, Tensor order, Tensor tiles, Tensor counts, int width) -> ()"
)
lib.define(
    "multi_linear(Tensor x, Tensor[] ws, Tensor?[] biases, Tensor a_pool, Tensor[] b_pools, Tensor start, Tensor rank, "
    "Tensor scaling, Tensor biased, Tensor slots, Tensor order, Tensor tiles, Tensor counts, int width) -> Tensor[]"
)


@torch.library.impl(lib, "multi_update_", "CompositeExplicitAutograd")
def multi_update_(
    ys: list[Tensor],
    x: Tensor,
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> None:
    """y += scaling·(x·aᵀ·bᵀ + lora_bias) in place, each row with its own adapter, for the layers that share x.

    ys: [..., N] each.   x: [..., K].   a_pool: [members, T, K], b_pools: [T, N]: rank rows.   start: [G].   rank,
    scaling, biased: [members, G].   order, tiles, counts: the rows' routing.   width: at least the largest rank.
    """
    with plain(x):
        h = kernels.multi_shrink(rows_of(x), a_pool, start, rank, width, kernels.Routes(order, tiles, counts))
        expand_behind_(ys, h, b_pools, start, rank, scaling, biased, order, tiles, counts)


def shrink_ahead(
    x: Tensor, a_pool: Tensor, start: Tensor, rank: Tensor, order: Tensor, tiles: Tensor, counts: Tensor, width: int
) -> Tensor | None:
    """`multi_update_`'s h, begun on a second stream beside what is launched before `kernels.overlap.join`.

    None where that is not worth it: outside of a CUDA graph's capture, or on a GPU whose table does not say so.
    """
    if not kernels.overlap.captured(x) or not kernels.overlap.pays(kernels.arch(x), "shrink"):
        return None
    with plain(x):
        routes = kernels.Routes(order, tiles, counts)
        h: Tensor = kernels.overlap.ahead(  # rows that are a copy are the second stream's: the first would reuse them
            x, lambda: kernels.multi_shrink(rows_of(x), a_pool, start, rank, width, routes)
        )
    return h


def expand_behind_(
    ys: list[Tensor],
    h: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
) -> None:
    """The other half of `multi_update_`, of its h."""
    routes = kernels.Routes(order, tiles, counts)
    kernels.multi_expand([y.view(-1, y.shape[-1]) for y in ys], h, b_pools, start, rank, scaling, biased, routes)


@torch.library.register_fake("fastlora::multi_update_", lib=lib)
def _(*_: Any) -> None:
    return None


@torch.library.impl(lib, "multi_linear", "CompositeExplicitAutograd")
def multi_linear(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor | None],
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    slots: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> list[Tensor]:
    """x·wᵀ + bias and each row's own low-rank term, one launch a layer: for few rows.

    ws: [N, K] each, biases: [N] each or None.   slots: [M] int32, −1 for base only.   The rest as in `multi_update_`.
    Returns [..., N] each.
    """
    with plain(x):
        rows = rows_of(x)
        h = kernels.multi_shrink(rows, a_pool, start, rank, width, kernels.Routes(order, tiles, counts))
        layers = zip(ws, biases, b_pools, rank, scaling, biased, h.unbind(1), strict=True)
        ys = [
            kernels.multi_linear(rows, w, bias, part, b_pool, start, ranks, scale, extra, slots)
            for w, bias, b_pool, ranks, scale, extra, part in layers
        ]
    return [shaped(y, *x.shape[:-1]) for y in ys]


@torch.library.register_fake("fastlora::multi_linear", lib=lib)
def _(x: Tensor, ws: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in ws]
