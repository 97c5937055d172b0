"""Many adapters in one batch: the pools that hold them, who is who in a batch, and the module that serves both.

Adapters of all layers that share an input lie side by side in pools of rank rows. A batch says which slot each request
takes; outside a batch a layer is its base layer, to the bit. `trained` has the layer's other side, where adapters are
trained instead of served.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import dispatch, eager, ops
from fastlora.serving import turn_of
from fastlora.stacks import Stacks, gather
from fastlora.trained import JobLayer

MAX_RANK = 512
"""The largest rank of an adapter."""


@dataclass(frozen=True)
class Factors:
    """One layer's part of an adapter.   a: [R, K].   b: [N, R].   lora_bias: [N] or None.   scaling: a number."""

    a: Tensor
    b: Tensor
    lora_bias: Tensor | None
    scaling: float


@dataclass
class Tables:
    """What all layers of a bank share.   rows: T, rank rows.   start: [G] int32, each slot's first rank row.

    widest: by slot, on the host, the largest rank over all layers, 0 where nobody is.   given: [G + 2] int32, what a
    mapping's number means, the number + 1 being its place: itself where its slot was given out, else −1.   edition:
    counts the numbers that were taken back.   fused_rows: up to so many rows a plain linear layer's own matmul runs in
    our launch too.   standing: each thread's prepared mapping.   said: how many batches are being served or stand, in
    all threads.
    """

    rows: int
    start: Tensor
    widest: list[int] = field(default_factory=list)
    edition: int = 0
    fused_rows: int = 0
    said: int = 0
    standing: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        self.given = torch.full((self.slots + 2,), -1, dtype=torch.int32, device=self.start.device)

    def __getstate__(self) -> Any:
        """Locks and threads' batches are no part of a copy, and without them it would serve the base, unsaid."""
        raise TypeError("model: got one that a bank serves, to copy or to pickle; wanted it before the bank, or closed")

    @classmethod
    def empty(cls, slots: int, rows: int, device: torch.device) -> Tables:
        return cls(rows, torch.zeros(slots, dtype=torch.int32, device=device), [0] * slots)

    def hold(self, slot: int, start: int, rank: int) -> None:
        """The slot's adapter begins at `start`; with rank 0 there is none any more."""
        self.start[slot] = start
        self.widest[slot] = rank

    def give(self, slot: int) -> None:
        """Mappings may name the slot."""
        self.given[slot + 1] = slot

    def take_back(self, slot: int) -> None:
        """In mappings the slot is the base alone again."""
        self.given[slot + 1] = -1
        self.edition += 1

    @property
    def slots(self) -> int:
        return len(self.start)


class Batch:
    """Which slot each request of a batch takes: the truth on the host, and on the device what the kernels read.

    slots: by request, −1 for the base alone.   ranks: the largest rank of each slot that occurs, over all layers.
    A batch never changes; several threads may run different ones.
    """

    def __init__(self, tables: Tables, slots: Sequence[int], ranks: dict[int, int]) -> None:
        self.tables, self.slots = tables, tuple(slots)
        self.width = max((ranks[slot] for slot in self.slots if slot >= 0), default=0)
        self._routes: dict[int, Any] = {}
        self._rows: dict[int, Tensor] = {}
        self._stacks: dict[int, list[Stacks]] = {}

    def share(self, x: Tensor) -> int:
        """Rows of x: [..., K] that each request has: its tokens, times its beams, which lie side by side."""
        if x.dim() == 1 or x.shape[0] % len(self.slots):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, wanted a multiple of the batch's {len(self.slots)} requests first"
            )
        return x.shape[:-1].numel() // len(self.slots)

    def routes(self, x: Tensor) -> Any:
        """The device's routing of x's rows, made once for all layers."""
        share = self.share(x)
        if share not in self._routes:
            empty = ops.kernels.Routes.empty(len(self.slots) * share, self.tables.slots, x.device)
            self._routes[share] = ops.kernels.route(self.rows(x), empty)
        return self._routes[share]

    def rows(self, x: Tensor) -> Tensor:
        """[M] int32, the slot of each row of x, on its device."""
        share = self.share(x)
        if share not in self._rows:
            slots = torch.tensor(self.slots, dtype=torch.int32).repeat_interleave(share)
            self._rows[share] = slots.to(x.device, non_blocking=True)
        return self._rows[share]

    def stacks(self, group: Group) -> list[Stacks]:
        """The group's factors in the order of the requests, gathered once for a CPU."""
        if id(group) not in self._stacks:
            with torch.inference_mode(False):  # they may outlive the caller's inference mode
                self._stacks[id(group)] = gather(group, self.tables.start, self.slots)
        return self._stacks[id(group)]

    def on_host(self) -> Batch:
        """The batch whose slots the host knows: itself."""
        return self


class Group:
    """Layers that are called with the same tensor, and the pools of their adapters' rank rows.

    a_pool: [members, T + 1, K].   b_pools: [T + 1, N] each.   The last row is zero, and pads short adapters.
    rank, biased: [members, G] int32.   scaling: [members, G] fp32.   A slot of rank 0 is base only.
    """

    def __init__(self, members: Sequence[MultiLoRALinear], tables: Tables, dtype: torch.dtype) -> None:
        if not 1 <= len(members) <= ops.GROUP:
            raise ValueError(f"members: got {len(members)} layers, wanted 1 to {ops.GROUP}")
        self.members, self.tables = list(members), tables
        device, K, T, G = tables.start.device, members[0].in_features, tables.rows, tables.slots
        self.a_pool = torch.zeros((len(members), T + 1, K), dtype=dtype, device=device)
        self.b_pools = [torch.zeros((T + 1, m.out_features), dtype=dtype, device=device) for m in members]
        self.rank = torch.zeros((len(members), G), dtype=torch.int32, device=device)
        self.biased = torch.zeros_like(self.rank)
        self.scaling = torch.zeros((len(members), G), device=device)
        self.ranks = [[0] * G for _ in members]
        self._ready = threading.local()
        for index, member in enumerate(members):
            member.group, member.index = self, index

    def store(self, slot: int, start: int, factors: Sequence[Factors | None]) -> None:
        """Copy one adapter's parts into the rank rows from `start` on; None where it leaves a layer alone."""
        for member, part in enumerate(factors):
            if part is None:
                continue
            R = len(part.a)
            rows = slice(start, start + R)
            self.a_pool[member, rows].copy_(part.a)
            self.b_pools[member][rows].copy_(part.b.t())
            if part.lora_bias is not None:
                self.b_pools[member][rows.stop].copy_(part.lora_bias)
            self.biased[member, slot] = int(part.lora_bias is not None)
            self.scaling[member, slot] = part.scaling
            self.rank[member, slot] = R
            self.ranks[member][slot] = R

    def clear(self, slot: int) -> None:
        """The slot is base only again; its rank rows are free."""
        self.rank[:, slot] = 0
        self.biased[:, slot] = 0
        for ranks in self.ranks:
            ranks[slot] = 0

    def read(self, slot: int, start: int) -> list[Factors | None]:
        """What `store` was given, in the pools' dtype and on the CPU."""
        parts: list[Factors | None] = []
        for member, ranks in enumerate(self.ranks):
            R, b_pool = ranks[slot], self.b_pools[member]
            end = start + R
            if R == 0:
                parts.append(None)
                continue
            bias = b_pool[end].to("cpu", copy=True) if self.biased[member, slot] else None
            a = self.a_pool[member, start:end].to("cpu", copy=True)
            b = b_pool[start:end].t().to("cpu", copy=True)
            parts.append(Factors(a, b, bias, float(self.scaling[member, slot])))
        return parts

    def move(self, start: int, to: int, rows: int) -> None:
        """Rank rows to another place, which they may overlap."""
        self.a_pool[:, to : to + rows] = self.a_pool[:, start : start + rows].clone()
        for b_pool in self.b_pools:
            b_pool[to : to + rows] = b_pool[start : start + rows].clone()

    def run(self, member: int, x: Tensor, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The member's output for x; the others', made in the same launches, wait for their call with the same x."""
        version = None if x.is_inference() else x._version
        ready = getattr(self._ready, "outputs", None)
        if ready is not None and ready.x is x and ready.version == version and ready.batch is batch:
            y = ready.ys[member]
            ready.ys[member] = None
            if y is not None:
                if not any(other is not None for other in ready.ys):
                    self._ready.outputs = None
                return y
        self._ready.outputs = None
        plain = not args and not kwargs
        indices = list(range(len(self.members))) if plain else [member]
        if plain and self.fuses(x, batch):
            ys = self.fused(x, batch)
        else:
            h = self.begin(x, batch, indices)
            try:
                ys = [self.members[i].base(x, *args, **kwargs) for i in indices]
            finally:
                if h is not None:
                    ops.kernels.overlap.join(x)
            self.add(ys, x, batch, indices, h)
        if len(ys) == 1:
            return ys[0]
        self._ready.outputs = _Ready(x, version, batch, [None if i == member else y for i, y in enumerate(ys)])
        return ys[member]

    def forget(self) -> None:
        """Drop what waits for a call that never came."""
        self._ready.outputs = None

    def fuses(self, x: Tensor, batch: Batch) -> bool:
        """Whether the layers' own matmuls run in our launch: asked for, few rows on the kernels, plain layers that x
        fits. (What fits none is theirs to refuse: a kernel would read past the end of a row.)"""
        if self.tables.fused_rows == 0 or not 0 < x.shape[:-1].numel() <= self.tables.fused_rows:
            return False
        if batch.width == 0 or torch.is_grad_enabled() or dispatch.backend_of(x) != "triton":
            return False
        layers = [m.base_layer for m in self.members]
        plain = (type(y) is nn.Linear and not y._forward_hooks and not y._forward_pre_hooks for y in layers)
        fits = (y.in_features == x.shape[-1] and y.weight.dtype == x.dtype for y in layers)
        return all(plain) and all(fits) and not torch.is_autocast_enabled(x.device.type)

    def fused(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """The members' outputs, base and low-rank term in one launch each."""
        routes, bases = batch.routes(x), [m.base_layer for m in self.members]
        ys: list[Tensor] = torch.ops.fastlora.multi_linear(
            x, [base.weight for base in bases], [base.bias for base in bases], self.a_pool, self.b_pools,
            self.tables.start, self.rank, self.scaling, self.biased, batch.rows(x), routes.order, routes.tiles,
            routes.counts, batch.width,
        )  # fmt: skip
        return ys

    def begin(self, x: Tensor, batch: Batch, members: list[int]) -> Tensor | None:
        """`add`'s x·aᵀ on a second stream, beside the members' own matmuls; None where that is not worth it."""
        if batch.width == 0 or x.numel() == 0 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if dispatch.backend_of(x) != "triton":
            return None
        pick, routes = self._pick(members), batch.routes(x)
        return ops.shrink_ahead(
            x, self.a_pool[pick], self.tables.start, self.rank[pick], routes.order, routes.tiles, routes.counts,
            batch.width,
        )  # fmt: skip

    def _pick(self, members: list[int]) -> slice:
        """Of the pools: all members, or one."""
        return slice(None) if len(members) == len(self.members) else slice(members[0], members[0] + 1)

    def add(self, ys: list[Tensor], x: Tensor, batch: Batch, members: list[int], h: Tensor | None = None) -> None:
        """y += scaling·(x·aᵀ·bᵀ + lora_bias) in place, each request with its own adapter.   h: what `begin` gave."""
        if batch.width == 0 or x.numel() == 0:
            return
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(y.requires_grad for y in ys))
        if needs_grad or dispatch.backend_of(x) == "torch":
            batch.share(x)
            batch = batch.on_host()
            if batch.width == 0:
                return
            for stacks in batch.stacks(self):
                mine = [k for k, i in enumerate(stacks.live) if i in members]
                if mine:
                    every, first = len(mine) == len(stacks.live), mine[0] * stacks.width
                    a = stacks.a if every else stacks.a[:, first : first + stacks.width]
                    bs, biases = [stacks.bs[k] for k in mine], [stacks.biases[k] for k in mine]
                    adapted = [ys[members.index(stacks.live[k])] for k in mine]
                    eager.multi_update_(adapted, x, len(batch.slots), stacks.rows, a, bs, biases)
            return
        pick, routes = self._pick(members), batch.routes(x)
        b_pools, start, rank = [self.b_pools[i] for i in members], self.tables.start, self.rank[pick]
        how = self.scaling[pick], self.biased[pick], routes.order, routes.tiles, routes.counts
        if h is not None:
            ops.expand_behind_(ys, h, b_pools, start, rank, *how)
        else:
            torch.ops.fastlora.multi_update_(ys, x, self.a_pool[pick], b_pools, start, rank, *how, batch.width)


@dataclass
class _Ready:
    """Outputs that wait for their layer's call."""

    x: Tensor
    version: int | None
    batch: Batch
    ys: list[Tensor | None]


def _in_backward() -> bool:
    """Whether this thread runs autograd's backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MultiLoRALinear(JobLayer):
    """A linear layer that adds each request's own adapter, y[i] = base(x)[i] + scaling·(x[i]·aᵀ·bᵀ + lora_bias).

    base_layer: any layer [..., K] → [..., N], quantised ones too.   Which request has which adapter is said around the
    call: of a bank's adapters by `AdapterBank.use`, of jobs that train by `use_jobs` or `Jobs.use`. Outside of that,
    and for requests without an adapter, the output is the base layer's.
    """

    group: Group | None = None
    index: int = 0
    flat: bool = False
    """Whether an x of two dimensions is the batch, request by request."""
    seen: bool = True
    """Whether a run of the model on token ids calls it; what else calls it may begin with anything, as with images."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.jobs:
            return self.train_jobs(x, args, kwargs)
        turn = None if self.group is None else turn_of(self.group.tables)
        if self.group is None or turn is None or turn.batch is None:
            if turn is None and self.group is not None and _in_backward() and any(self.group.tables.widest):
                raise RuntimeError(
                    "backward: got a layer that is computed again (gradient checkpointing) outside of use; call "
                    "backward inside of it, where the forward was, also of the base alone: use([None, …])"
                )
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if turn.batch.width:
            if not self.seen and len(set(turn.batch.slots)) > 1:
                raise ValueError(
                    f"x: got shape {tuple(x.shape)} in a layer that a run of the model on token ids does not call, "
                    "wanted one adapter for all requests: whose rows these are cannot be known; leave this layer out "
                    "by target_modules"
                )
            if turn.rows:
                self._check_rows(x, turn.rows)
        return self.group.run(self.index, x, turn.batch, args, kwargs)

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, to add to in place: a copy where a hook may have kept it."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y.clone() if self.base_layer._forward_hooks else y

    def _check_rows(self, x: Tensor, rows: int) -> None:
        """Raises ValueError unless x begins with the rows that the model was called with."""
        whole = x.shape[0] % rows == 0 if self.flat else x.shape[0] == rows
        if not whole or (x.dim() == 2 and not self.flat):
            raise ValueError(
                f"x: got shape {tuple(x.shape)} in a layer of a model that was called with {rows} rows, wanted "
                f"[{rows}, tokens, {self.in_features}]: whose rows these are cannot be known; leave this layer out by "
                "target_modules"
            )

    def extra_repr(self) -> str:
        beside = f", beside={len(self.group.members) - 1}" if self.group is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{beside}"
