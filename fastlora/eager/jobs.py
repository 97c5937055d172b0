"""Several jobs' rows in one batch, in plain PyTorch operators: job after job, each on its own rows.

A loop over jobs, not over rows. One product with the factors of all jobs, and other jobs' columns masked, would take
ΣR ranks for every row, and inf or NaN of one job would reach another's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.eager.base import project, pull_back
from fastlora.eager.dropout import drop, drop_
from fastlora.eager.thin import add_low_rank_, low_rank, shrink, thin_dtype, wide_dtype, with_bias
from fastlora.reference import dropout_scale


class Part(NamedTuple):
    """The rows of one job in the batch: a slice where they lie together, their numbers otherwise."""

    job: int
    rows: slice | Tensor
    size: int


@lru_cache(maxsize=256)
def parts(jobs: tuple[int, ...], share: int, device: torch.device) -> tuple[Part, ...]:
    """Each job's rows, in their order.   jobs: of each request, −1 for the base alone.   share: rows of a request."""
    found = []
    for job in sorted({job for job in jobs if job >= 0}):
        at = [request for request, other in enumerate(jobs) if other == job]
        first, last = at[0], at[-1]
        rows: slice | Tensor = slice(first * share, (last + 1) * share)
        if last - first + 1 > len(at):
            rows = (torch.tensor(at)[:, None] * share + torch.arange(share)).view(-1).to(device)
        found.append(Part(job, rows, len(at) * share))
    return tuple(found)


def _parts(x: Tensor, jobs: Sequence[int]) -> tuple[Part, ...]:
    share = x.shape[0] // len(jobs) if jobs else 0
    return parts(tuple(jobs), share, x.device) if share else ()


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """A job's rows: a view where they lie together; x[rows] would take eight times as long as index_select."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _land_(y: Tensor, rows: slice | Tensor, f: Tensor, g: Tensor, scale: float) -> None:
    """y[rows] += scale·(f·g) in place, rounded once."""
    if isinstance(rows, Tensor) and y.dtype == f.dtype:  # a third of the time of taking y's rows and putting them back
        y.index_add_(0, rows, low_rank(f, g, scale, y.dtype))
        return
    mine = _take(y, rows)
    add_low_rank_(mine, f, g, scale)
    if isinstance(rows, Tensor):
        y.index_copy_(0, rows, mine)


def _add_(y: Tensor, rows: slice | Tensor, term: Tensor) -> None:
    """y[rows] += term in place."""
    if isinstance(rows, slice):
        y[rows] += term
    elif y.dtype == term.dtype:
        y.index_add_(0, rows, term)
    else:
        y.index_copy_(0, rows, _take(y, rows).add_(term))


def _product_(out: Tensor, f: Tensor, g: Tensor, scale: float) -> None:
    """out = scale·f·g, where it lies."""
    if out.dtype == f.dtype:
        torch.addmm(out, f, g, beta=0, alpha=scale, out=out)  # β = 0: out unread
    else:
        out.copy_(torch.mm(f, g).mul_(scale))


def _seed(part: Part, seeds: Tensor | None, ps: Sequence[float]) -> Tensor | None:
    """What draws the mask of a job's own rows: row 0 is the job's first, so that nobody's company moves it."""
    return None if seeds is None or ps[part.job] == 0 else seeds[part.job]


def _update_(
    y: Tensor,
    x: Tensor,
    as_: Sequence[Tensor],
    bs: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    jobs: Sequence[int],
    scales: Sequence[float],
    ps: Sequence[float],
) -> Tensor:
    """y += scale·(drop(x)·aᵀ·bᵀ + lora_bias) on each job's own rows.   Returns the h of all, one after the other."""
    hs = [x.new_empty(0, dtype=wide_dtype(x))]
    for part in _parts(x, jobs):
        job, rows = part.job, part.rows
        h = shrink(_take(x, rows), as_[job], _seed(part, seeds, ps), ps[job])
        _land_(y, rows, *with_bias(h, bs[job], lora_biases[job]), scales[job])
        hs.append(h.view(-1))
    return torch.cat(hs)


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

    Returns y: [M, N] in x's dtype, h: fp32, [M_j, R_j] of each job, flat and one after the other.
    """
    y = project(x, w, bias)
    return y, _update_(y, x, as_, bs, lora_biases, seeds, jobs, scales, ps)


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
    """As `jobs_linear` over any base output y.   Returns [M, N] in y's dtype, h."""
    out = y.to(y.dtype, copy=True, memory_format=torch.contiguous_format)
    return out, _update_(out, x, as_, bs, lora_biases, seeds, jobs, scales, ps)


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
    """dx, and da and db of each job from its own rows, zero for a job without any; each None unless wanted.

    x is read for da alone, h for db alone.   biased: whether a job has a lora_bias.   Returns dx: [M, K] in dy's dtype
    (without w the low-rank terms alone), da: [ΣR, K] in a's, db: [ΣR + biases, N] in b's, of each job
    the elements of [N, R] and then of its lora_bias.
    """
    (M, N), K = dy.shape, as_[0].shape[1]
    dx = (pull_back((dy, w)) if w is not None else dy.new_zeros((M, K))) if want_dx else None
    a_ends, b_ends = [0], [0]
    for a, has_bias in zip(as_, biased, strict=True):
        a_ends.append(a_ends[-1] + len(a))
        b_ends.append(b_ends[-1] + len(a) + has_bias)
    da = as_[0].new_zeros((a_ends[-1], K)) if want_da else None
    db = bs[0].new_zeros((b_ends[-1], N)) if want_db else None
    taken = 0
    for part in _parts(dy, jobs):
        job, rows, a, b, scale = part.job, part.rows, as_[part.job], bs[part.job], scales[part.job]
        mine, R = _take(dy, rows), len(a)
        thin = thin_dtype(mine, b)
        dy_thin = mine.to(thin)
        if db is not None and h is not None:
            at = b_ends[job]
            h_job = h[taken : taken + part.size * R].view(part.size, R)
            _product_(db[at : at + R].view(N, R), dy_thin.t(), h_job.to(thin), scale)
            if biased[job]:
                db[at + R] = mine.sum(0, dtype=wide_dtype(mine)).mul_(scale)
        taken += part.size * R
        if not (want_dx or want_da):
            continue
        seed = _seed(part, seeds, ps)
        scale *= 1.0 if seed is None else dropout_scale(ps[job])
        dh = torch.mm(dy_thin, b.to(thin))  # without its scale, which the next products bring
        if da is not None and x is not None:
            x_mine = _take(x, rows)
            thin = thin_dtype(x_mine, a)
            kept = x_mine.to(thin) if seed is None else drop(x_mine, seed, ps[job], thin)
            _product_(da[a_ends[job] : a_ends[job + 1]], dh.to(thin).t(), kept, scale)
        if dx is not None and seed is not None:
            _add_(dx, rows, drop_(low_rank(dh, a, scale, dy.dtype), seed, ps[job]))
        elif dx is not None:
            _land_(dx, rows, dh, a, scale)
    return dx, da, db
