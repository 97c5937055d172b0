"""Several jobs' layer in launches, as many however many jobs: which kernels run, forward and backward.

The base's products are the vendor's; the jobs' terms land on them in place. Forward: shrink, expand. Backward: dh, db,
da, and the update of dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora_kernels.dropout import keep_scale, threshold
from fastlora_kernels.launch import on_device
from fastlora_kernels.linear import base_linear
from fastlora_kernels.multi import multi_expand, multi_shrink
from fastlora_kernels.multi_outer import multi_outer
from fastlora_kernels.routing import Drops, Routes, route
from fastlora_kernels.sizes import cdiv


def pool_of(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[int]]:
    """(pool, starts): one [T, K] tensor in which each job's rows lie together, and the first of each.

    parts: a job's rows in one or two tensors [R, K] of one dtype.   Where all of them are rows of one storage, as a
    layer's jobs are, that storage as it is, whoever's rows lie between; otherwise a copy.
    """
    rows = [t for part in parts for t in part]
    K, origin = rows[0].shape[1], min(rows, key=Tensor.storage_offset)
    storage, first = origin.untyped_storage().data_ptr(), origin.storage_offset()
    starts, end = [], first
    for part in parts:
        at = part[0].storage_offset()
        starts.append((at - first) // K)
        for t in part:
            apart = t.untyped_storage().data_ptr() != storage or t.storage_offset() != at or (at - first) % K
            if apart or t.stride(1) != 1 or (len(t) > 1 and t.stride(0) != K):
                ends = list(accumulate(sum(map(len, part)) for part in parts))
                return torch.cat(rows), [0, *ends[:-1]]
            at += len(t) * K
        end = max(end, at)
    return origin.as_strided(((end - first) // K, K), (K, 1), first), starts


class Sheet(NamedTuple):
    """What the kernels read of each job, [G] each: int32 ranks, whether biased, first rows of pools and of gradients;
    fp32 scalings and dropout scales; int32 dropout thresholds."""

    rank: Tensor
    biased: Tensor
    unbiased: Tensor
    a_start: Tensor
    b_start: Tensor
    da_start: Tensor
    db_start: Tensor
    thresholds: Tensor
    scaling: Tensor
    kept: Tensor


@lru_cache(maxsize=1024)
def sheet(
    ranks: tuple[int, ...],
    biased: tuple[bool, ...],
    a_starts: tuple[int, ...],
    b_starts: tuple[int, ...],
    scales: tuple[float, ...],
    ps: tuple[float, ...],
    device: torch.device,
    stream: int,
) -> Sheet:
    """Copied to the device once for the same jobs.   stream: where the copies run, and those that read them."""
    G = len(ranks)
    da_starts = [sum(ranks[:job]) for job in range(G)]
    db_starts = [sum(ranks[:job]) + sum(biased[:job]) for job in range(G)]
    whole = [ranks, biased, [0] * G, a_starts, b_starts, da_starts, db_starts, [threshold(p) for p in ps]]
    numbers = torch.tensor(whole, dtype=torch.int32).to(device)
    factors = torch.tensor([scales, [keep_scale(p) for p in ps]], dtype=torch.float32).to(device)
    return Sheet(*numbers.unbind(), *factors.unbind())


@lru_cache(maxsize=64)
def routes(jobs: tuple[int, ...], share: int, G: int, device: torch.device, stream: int) -> Routes:
    """The routing of a batch, made once for all layers.   jobs: of each request.   share: rows of a request."""
    slots = torch.tensor(jobs, dtype=torch.int32).repeat_interleave(share).to(device)
    return route(slots, Routes.empty(len(slots), G, device))


class Crew:
    """The jobs of one call: their pools, their tables, the rows' routing."""

    def __init__(
        self,
        x: Tensor,
        as_: Sequence[Tensor],
        bs: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        biased: Sequence[bool],
        seeds: Tensor | None,
        jobs: Sequence[int],
        scales: Sequence[float],
        ps: Sequence[float],
    ) -> None:
        self.a_pool, a_starts = pool_of([[a] for a in as_])
        self.b_pool, b_starts = pool_of(
            [[b.t()] if bias is None else [b.t(), bias[None]] for b, bias in zip(bs, biases, strict=True)]
        )
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        ranks = tuple(len(a) for a in as_)
        with on_device(x):
            self.sheet = sheet(
                ranks, tuple(biased), tuple(a_starts), tuple(b_starts), tuple(scales), tuple(ps), x.device, stream
            )
            self.routes = routes(tuple(jobs), len(x) // len(jobs), len(as_), x.device, stream)
        self.ranks, self.biases = sum(ranks), sum(biased)
        self.width = cdiv(max(ranks), 16) * 16
        self.drops = Drops(seeds, self.sheet.thresholds) if seeds is not None and any(ps) else None

    def shrink(self, x: Tensor) -> Tensor:
        """h = drop(x)·aᵀ of each row's job.   Returns [M, width] fp32, written on the jobs' rows and ranks alone."""
        s = self.sheet
        return multi_shrink(
            x, self.a_pool[None], s.a_start, s.rank[None], self.width, self.routes,
            factor=s.kept, drops=self.drops, whole=True,
        )[0, 0]  # fmt: skip

    def add_(self, y: Tensor, h: Tensor) -> Tensor:
        """y += scale·(h·bᵀ + lora_bias) on the jobs' rows."""
        s = self.sheet
        multi_expand(
            [y], h[None, None], [self.b_pool], s.b_start, s.rank[None], s.scaling[None], s.biased[None], self.routes
        )
        return y

    def dh(self, dy: Tensor) -> Tensor:
        """scale·dy·b of each row's job: a shrink over the out features.   Returns [M, width] fp32."""
        s = self.sheet
        return multi_shrink(
            dy, self.b_pool[None], s.b_start, s.rank[None], self.width, self.routes, factor=s.scaling, whole=True
        )[0, 0]

    def db(self, dy: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        """scale·dyᵀ·h over each job's rows, and scale·Σ dy where it has a lora_bias: [N, R] and [N], one after the
        other.   Returns [ΣR + biases, N]."""
        s, rows = self.sheet, self.ranks + self.biases
        return multi_outer(dy, h, s.db_start, s.rank, s.biased, s.scaling, rows, self.routes, dtype, by_feature=True)

    def da(self, x: Tensor, dh: Tensor, dtype: torch.dtype) -> Tensor:
        """dhᵀ·drop(x) over each job's rows.   Returns [ΣR, K]."""
        s = self.sheet
        return multi_outer(
            x, dh, s.da_start, s.rank, s.unbiased, s.kept, self.ranks, self.routes, dtype, drops=self.drops
        )

    def add_dx_(self, dx: Tensor, dh: Tensor) -> Tensor:
        """dx += mask/(1−p) ⊙ (dh·a) on the jobs' rows: an expand over the in features."""
        s = self.sheet
        multi_expand(
            [dx], dh[None, None], [self.a_pool], s.a_start, s.rank[None], s.kept[None], s.unbiased[None], self.routes,
            drops=self.drops,
        )  # fmt: skip
        return dx


def jobs_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    as_: Sequence[Tensor],
    bs: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    jobs: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias, and scale·(drop(x)·aᵀ·bᵀ + lora_bias) of each job on its own rows.

    x: [M, K], as many rows for each entry of jobs.   Returns y: [M, N] in x's dtype, h: [M, width] fp32.
    """
    y = base_linear(x, w, bias)
    crew = Crew(x, as_, bs, lora_biases, [t is not None for t in lora_biases], seeds, jobs, scales, ps)
    h = crew.shrink(x)
    return crew.add_(y, h), h


def jobs_update(
    y: Tensor,
    x: Tensor,
    as_: Sequence[Tensor],
    bs: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    jobs: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """As `jobs_linear` over any base output y.   Returns a new [M, N] in y's dtype, and h."""
    crew = Crew(x, as_, bs, lora_biases, [t is not None for t in lora_biases], seeds, jobs, scales, ps)
    h = crew.shrink(x)
    return crew.add_(y.clone(memory_format=torch.contiguous_format), h), h


def jobs_backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    as_: Sequence[Tensor],
    bs: Sequence[Tensor],
    biased: Sequence[bool],
    h: Tensor | None,
    seeds: Tensor | None,
    jobs: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
    want_dx: bool,
    want_da: bool,
    want_db: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (without w low-rank terms alone), da, db of each job from its own rows, zero without any; None unless wanted.

    dy: [M, N], any strides.   x: [M, K], read for da alone.   h: as forward left it, read for db alone.
    Returns dx: [M, K] in dy's dtype, da: [ΣR, K] in a's, db: [ΣR + biases, N] in b's dtype, each job's [N, R] and [N].
    """
    crew = Crew(dy, as_, bs, [None] * len(bs), biased, seeds, jobs, scales, ps)
    dx = da = db = None
    if want_db and h is not None:
        db = crew.db(dy, h, bs[0].dtype)
    if not (want_dx or want_da):
        return dx, da, db
    dh = crew.dh(dy)
    if want_da and x is not None:
        da = crew.da(x, dh, as_[0].dtype)
    if want_dx:
        base = torch.mm(dy, w) if w is not None else dy.new_empty((len(dy), as_[0].shape[1])).zero_()
        dx = crew.add_dx_(base, dh)
    return dx, da, db
