"""*Fused* or *split*: a main GEMM run both ways, and the rows of a table that say which was faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlora_kernels as kernels
from benchmarks.probe import SCALE, Problem, operands, run
from fastlora_kernels import Tile
from fastlora_kernels.dropout import empty_bits


@dataclass(frozen=True)
class Race:
    """The main GEMM of a layer, or the dx of a group, *fused* beside *split*.

    members: one of expand or dx, or those of dx that share an input.   masks: how many of them drop.
    tiles: forced ones of the fused kernel and of the update in place.
    """

    members: tuple[Problem, ...]
    masks: int
    tiles: tuple[Tile, Tile] | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """What names it in a table's row."""
        first, N = self.members[0], sum(member.N for member in self.members)
        kernel = first.kernel if len(self.members) == 1 else "group_dx"
        N, K = (N, first.K) if kernel == "expand" else (first.K, N)
        return {"kernel": kernel, "M": first.M, "N": N, "K": K, "dtype": first.main, "masks": self.masks}

    def ways(self, device: str) -> dict[str, Callable[[], Any]]:
        """Both, on fresh operands.   Split: the GEMM by the vendor's library, and the low-rank terms added in place."""
        layers = [operands(member, device) for member in self.members]
        fused, add = self.tiles or (None, None)
        t, kernel = layers[0], self.members[0].kernel
        if kernel == "expand":

            def apart() -> Tensor:
                y = torch.nn.functional.linear(t.x, t.w, t.bias)
                return kernels.add_expand(y, t.h, t.b, SCALE, out=y, config=add)

            return {"fused": lambda: run(kernels, kernel, t, config=fused), "split": apart}
        dys, ws, dhs, as_ = ([getattr(t, name) for t in layers] for name in ("dy", "w", "dh", "a"))
        how: dict[str, Any] = {"ps": [0.1] * self.masks + [0.0] * (len(layers) - self.masks)}
        if self.masks:  # which dx finds where the x pass left them
            how["bits"], seeds = empty_bits(len(layers), t.x), torch.stack([t.seed for t in layers])
            kernels.group_x_pass(t.x, dhs, [a.dtype for a in as_], **how, seeds=seeds)

        def added() -> Tensor:
            grad = torch.mm(dys[0], ws[0])
            for dy, w in zip(dys[1:], ws[1:], strict=True):
                grad.addmm_(dy, w)
            return kernels.group_add_dx(grad, dhs, as_, grad.dtype, **how, config=add)

        return {"fused": lambda: kernels.group_dx(dys, ws, dhs, as_, **how, config=fused), "split": added}


def warm_both(race: Race) -> None:
    """Compile both ways by running them once, in a process of its own."""
    for way in race.ways("cuda").values():
        way()
    torch.cuda.synchronize()


def strategy_rows(measured: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Rows for each measured layer, by M: the faster way up to each M; neighbours that agree are one row.

    They hold from the least M measured to the largest, and nowhere else. Those of few masks come first; between two
    numbers of masks, the larger one's hold.
    """
    rows: list[dict[str, Any]] = []
    layers: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for m in measured:
        by_masks = layers.setdefault((m["kernel"], m["dtype"], m["N"], m["K"]), {})
        by_masks.setdefault(m["masks"], []).append(m)
    for (kernel, dtype, N, K), found in layers.items():
        fewer = -1
        for masks, of in sorted(found.items()):
            masked = {"max_masks": masks} if kernel != "expand" else {}
            if masks:
                masked = {"min_masks": max(fewer + 1, 1), **masked}
            fewer, mine = masks, []
            for m in sorted(of, key=lambda m: m["M"]):
                best = "fused" if m["fused"] < m["split"] else "split"
                why = f"fused {m['fused']:.3f} ms, split {m['split']:.3f} ms at M = {m['M']}"
                if mine and mine[-1]["strategy"] == best:
                    mine[-1] |= {"max_M": m["M"], "why": why}
                else:
                    least = mine[-1]["max_M"] + 1 if mine else m["M"]
                    sizes = {"kernel": kernel, "dtype": [dtype], "N": N, "K": K, "min_M": least, "max_M": m["M"]}
                    mine.append({**sizes, **masked, "strategy": best, "source": source, "why": why})
            rows += mine
    return rows


def on_top(new: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new` rows before the earlier ones, less those measured ones that can no longer be reached."""

    def layer(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(str, (row.get(name) for name in ("kernel", "dtype", "N", "K", "min_masks", "max_masks"))))

    raced: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in new:
        least, most = raced.get(layer(row), (math.inf, 0))
        raced[layer(row)] = min(least, row["min_M"]), max(most, row["max_M"])

    def reached(row: dict[str, Any]) -> bool:
        least, most = raced.get(layer(row), (math.inf, 0))
        return row["source"] == "predicted" or row.get("min_M", 0) < least or row.get("max_M", math.inf) > most

    return [*new, *filter(reached, earlier)]
