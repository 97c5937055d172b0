"""What the compile audit compiles: every tile of the tables × the dtypes, ranks and flags that reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import fastlora_kernels as kernels
from fastlora_kernels.dropout import empty_bits
from fastlora_kernels.reduce import reduce
from fastlora_kernels.routing import Drops, Routes
from fastlora_kernels.tables import Tile, table, tile

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")

AXES = {
    "shrink": "MK", "expand": "MNKR", "add": "MNR", "dy": "MNK", "x": "MK", "dx": "MNKR",
    "group_shrink": "MK", "group_dy": "MNK", "group_x": "MK", "group_dx": "MNKR", "group_add": "MNR",
    "glu": "MK", "glu_backward": "MK",
    "multi_shrink": "KR", "multi_expand": "NR", "multi_linear": "MNKR", "multi_outer": "MKR",
    "reduce": "", "count": "", "route": "",
}  # fmt: skip
"""The kernels, by their names in the tables, and the blocks of a tile that each one reads."""

FLAGS = {
    "shrink": ("dropout",),
    "expand": ("biases",),
    "add": ("add", "none lora_bias", "none dropout", "none bits dropout"),
    "dy": ("",),
    "x": ("dropout", "bits dropout"),
    "dx": ("", "dropout", "bits dropout"),
    "group_shrink": ("3 members dropout",),
    "group_dy": ("3 members",),
    "group_x": ("3 members dropout", "3 members bits dropout"),
    "group_dx": ("3 members 1 dropout", "3 members dropout", "3 members bits 1 dropout", "3 members bits dropout"),
    "group_add": ("3 members dropout", "3 members bits dropout"),
    "glu": ("gelu dropout", "silu"),
    "glu_backward": ("gelu z", "gelu_tanh z"),
    "multi_shrink": ("3 layers", "dropout"),
    "multi_expand": ("1 layer", "3 layers", "dropout"),
    "multi_linear": ("bias",),
    "multi_outer": ("by feature", "dropout"),
}
"""The heaviest form of each kernel; the GEMM of dx also as it mostly runs, without a mask, and a
group's with the one mask that its largest tiles take. bits: masks that the x pass leaves for dx."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIXES = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32"))
"""dtypes of the big operands and of the adapter."""

NO_ADAPTER = ("glu_backward",)
"""Kernels that no adapter meets: a mix of dtypes is none to them."""

RANKS = (512, 64, 32, 16)
ROWS, FEATURES = 8192, 4096
SLOTS, POOL = 64, 2048
"""The typical problem: sizes and strides are multiples of 16, as a launch then specialises on."""


@dataclass(frozen=True)
class Case:
    """One compilation: a launch of `kernel` as its launcher makes it."""

    arch: str
    kernel: str
    tile: Tile
    main: str
    adapter: str
    rank: int
    flags: str
    rows: int = ROWS
    features: int = FEATURES

    @property
    def key(self) -> tuple[str, ...]:
        """What names the case in a table: arch, kernel, tile, dtypes, rank, flags."""
        axes = AXES[self.kernel]
        blocks = "x".join(str(getattr(self.tile, f"BLOCK_{axis}")) for axis in axes if axis != "R")
        step = f" r{self.tile.BLOCK_R}" if "R" in axes else ""
        form = " tma" * self.tile.tma + " specialized" * self.tile.specialize + " flat" * self.tile.flatten
        size = f"{blocks}{step} w{self.tile.num_warps} s{self.tile.num_stages}{form}" if axes else "1024"
        dtypes = self.main if self.main == self.adapter else f"{self.main}+{self.adapter}"
        return self.arch, self.kernel, size, dtypes, str(self.rank), self.flags

    def launch(self) -> None:
        """Call the launcher on tensors without storage; who records launches learns what it would have launched."""
        M, N, K, R, t = self.rows, self.features, self.features, self.rank, self.tile
        main, adapter = DTYPES[self.main], DTYPES[self.adapter]

        def of(*shape: int, dtype: torch.dtype = main) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, w, dy, h = of(M, K), of(N, K), of(M, N), of(M, R, dtype=torch.float32)
        a, b, lora_bias = of(R, K, dtype=adapter), of(N, R, dtype=adapter), of(N, dtype=adapter)
        p, seed = (0.1 if "dropout" in self.flags else 0.0), of(dtype=torch.int64)
        bits = empty_bits(1, x) if "bits" in self.flags else None
        match self.kernel:
            case "shrink":
                kernels.shrink(x, a, p=p, seed=seed, config=t)
            case "expand" if self.flags == "biases":
                kernels.expand(x, w, of(N), h, b, 0.5, lora_bias, config=t)
            case "expand":
                kernels.expand(x, w, None, h, b, 0.5, config=t)
            case "add" if self.flags == "add":
                kernels.add_expand(dy, h, b, 0.5, out=dy, config=t)
            case "add" if self.flags == "none lora_bias":
                kernels.low_rank(h, b, 0.5, main, lora_bias, config=t)
            case "add":
                kernels.low_rank_dx(h, a, main, p=p, seed=seed, bits=bits, config=t)
            case "dy":
                kernels.dy_pass(dy, h, b, 0.5, config=t)
            case "x":
                kernels.x_pass(x, h, adapter, p=p, seed=seed, bits=bits, config=t)
            case "dx":
                kernels.dx(dy, w, h, a, p=p, seed=seed, bits=bits, config=t)
            case "glu":
                kernels.glu(x, dy, self.flags.split()[0], a, p=p, seed=seed, config=t)
            case "glu_backward":
                kernels.glu_backward(x, dy, of(M, K), self.flags.split()[0], want_z=True, config=t)
            case "reduce":
                reduce(of(4, N, R, dtype=torch.float32), of(N, R, dtype=adapter))
            case "count" | "route":
                kernels.route(of(self.rows, dtype=torch.int32), Routes.empty(self.rows, SLOTS, "meta"))
            case multi if multi.startswith("multi"):
                self._launch_multi(x, dy, h, of)
            case _:
                self._launch_group(x, w, dy, a, b, of)

    def _launch_group(self, x: Tensor, w: Tensor, dy: Tensor, a: Tensor, b: Tensor, of: Callable[..., Tensor]) -> None:
        """The kernels of a group whose members have one size: h and dh are views of what they share."""
        members = int(self.flags[0])
        shared = of(self.rows, members * self.rank, dtype=torch.float32)
        hs = [shared[:, i * self.rank : (i + 1) * self.rank] for i in range(members)]
        ps = [0.1 if i < masks(self.flags) else 0.0 for i in range(members)]
        seeds, every = of(members, dtype=torch.int64), [True] * members
        bits = empty_bits(members, x) if "bits" in self.flags else None
        match self.kernel:
            case "group_shrink":
                kernels.group_shrink(x, [a] * members, ps=ps, seeds=seeds, config=self.tile)
            case "group_dy":
                scales = [0.5] * members
                kernels.group_dy_pass(
                    [dy] * members, hs, [b] * members, scales, want_dh=every, want_db=every, config=self.tile
                )
            case "group_x":
                kernels.group_x_pass(x, hs, [a.dtype] * members, ps=ps, seeds=seeds, bits=bits, config=self.tile)
            case "group_dx":
                kernels.group_dx(
                    [dy] * members, [w] * members, hs, [a] * members, ps=ps, seeds=seeds, bits=bits, config=self.tile
                )
            case "group_add":
                kernels.group_low_rank_dx(hs, [a] * members, x.dtype, ps=ps, seeds=seeds, bits=bits, config=self.tile)

    def _launch_multi(self, x: Tensor, dy: Tensor, h: Tensor, of: Callable[..., Tensor]) -> None:
        """The kernels of many adapters: SLOTS of them in a pool of POOL rank rows."""
        members, adapter, number = int(self.flags[0]) if "layer" in self.flags else 1, DTYPES[self.adapter], torch.int32
        start, rank = of(SLOTS, dtype=number), of(members, SLOTS, dtype=number)
        routes, scaling = Routes.empty(self.rows, SLOTS, "meta"), of(members, SLOTS, dtype=torch.float32)
        trains = "layer" not in self.flags  # with dropout, which only jobs that train have
        drops = Drops(of(SLOTS, dtype=torch.int64), start) if "dropout" in self.flags else None
        if self.kernel == "multi_shrink":
            kernels.multi_shrink(
                x, of(members, POOL, self.features, dtype=adapter), start, rank, self.rank, routes,
                factor=scaling[0] if trains else None, drops=drops, whole=trains, config=self.tile,
            )  # fmt: skip
        elif self.kernel == "multi_expand":
            parts, b_pool = h.view(1, 1, *h.shape), of(POOL, self.features, dtype=adapter)
            kernels.multi_expand(
                [dy] * members, parts.expand(1 if trains else 4, members, -1, -1), [b_pool] * members, start, rank,
                scaling, rank, routes, drops=drops, config=self.tile,
            )  # fmt: skip
        elif self.kernel == "multi_outer":
            kernels.multi_outer(
                x, h, start, start, start, scaling[0], POOL, routes, adapter,
                by_feature="feature" in self.flags, drops=drops, config=self.tile,
            )  # fmt: skip
        else:
            N = self.features
            kernels.multi_linear(
                x, of(N, N), of(N), h.expand(4, -1, -1), of(POOL, N, dtype=adapter), start, start, scaling[0], start,
                of(self.rows, dtype=number), config=self.tile,
            )  # fmt: skip


def ranks(kernel: str, t: Tile) -> tuple[int, ...]:
    """The ranks to try, heaviest first: a GEMM's prologue takes every rank in steps of the tile's own."""
    return (64,) if "R" in AXES[kernel] else RANKS


def masks(flags: str) -> int:
    """How many members of a group drop."""
    if "members" not in flags or "dropout" not in flags:
        return 0
    return 1 if "1 dropout" in flags else int(flags[0])


def cases(archs: tuple[str, ...] = ARCHS, names: tuple[str, ...] = tuple(AXES)) -> Iterator[Case]:
    """Every case of these architectures and kernels, in the order of the tables; no key twice."""
    seen = set()
    for arch in archs:
        for kernel in names:
            for case in _of_tables(arch, kernel) if AXES[kernel] else _of_one(arch, kernel):
                if case.key not in seen:
                    seen.add(case.key)
                    yield case


def _of_tables(arch: str, kernel: str) -> Iterator[Case]:
    for row in table(arch)["tiles"][kernel]:
        t, rows, features = Tile(**row["tile"]), row.get("max_M", ROWS), row.get("max_N", FEATURES)
        for main, adapter in MIXES:
            if kernel in NO_ADAPTER and main != adapter:
                continue
            for flags in FLAGS[kernel]:
                for rank in ranks(kernel, t):
                    if tile(kernel, arch, DTYPES[main], rows, features, rank, t.tma, masks(flags)) == t:
                        yield Case(arch, kernel, t, main, adapter, rank, flags, rows, features)
                        break


def _of_one(arch: str, kernel: str) -> Iterator[Case]:
    """Kernels without a tile: the reduction by what it writes, the routing as it is."""
    for out in DTYPES if kernel == "reduce" else ("fp32",):
        yield Case(arch, kernel, Tile(1), "fp32", out, 16, "")
