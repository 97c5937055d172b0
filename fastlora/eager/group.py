"""Layers that share an input, in plain PyTorch operators: x is widened once, dx is summed in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.eager.base import native, project, pull_back
from fastlora.eager.dropout import drop, drop_
from fastlora.eager.thin import add_low_rank_, cast, low_rank, outer, thin_dtype, wide_dtype, with_bias
from fastlora.reference import dropout_scale

STACKED = 8
"""Ranks that are multiples of it shrink in one product, 15 % faster; of others MKL sums a stack's columns in an order
that errs 1.2 to 1.3 times as much as their own."""


def columns(as_: Sequence[Tensor | None]) -> list[slice]:
    """Where each member's columns lie in the group's h: [M, ΣR]; a member without an adapter has none."""
    ends, end = [], 0
    for a in as_:
        start, end = end, end + (0 if a is None else a.shape[0])
        ends.append(slice(start, end))
    return ends


def _drawn(seeds: Tensor | None, ps: Sequence[float]) -> list[Tensor | None]:
    """What draws each member's mask, None where it has none."""
    if seeds is None:
        return [None] * len(ps)
    return [seed if p > 0 else None for seed, p in zip(seeds, ps, strict=True)]


def _thin(x: Tensor, factors: Sequence[Tensor]) -> torch.dtype:
    """What the products with the adapters' factors run in: x's dtype where they and a matmul have it, else fp32."""
    return x.dtype if native(x) and all(f.dtype == x.dtype for f in factors) else wide_dtype(x)


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return cast(factors[0], dtype) if len(factors) == 1 else torch.cat([cast(f, dtype) for f in factors])


def lora_group(
    x: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None],
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """y_i = x·w_iᵀ + bias_i + scale_i·(drop_i(x)·a_iᵀ·b_iᵀ + lora_bias_i) for every member.

    Returns ys: [M, N_i] in x's dtype, h: [M, ΣR] fp32, the members' side by side.
    """
    ys = [project(x, w, b) for w, b in zip(ws, biases, strict=True)]
    adapters, parts = [a for a in as_ if a is not None], columns(as_)
    thin = _thin(x, adapters)
    if adapters and seeds is None and all(len(a) % STACKED == 0 for a in adapters):
        h = cast(torch.mm(cast(x, thin), _stacked(adapters, thin).t()), wide_dtype(x))
    else:
        h = x.new_empty((len(x), parts[-1].stop), dtype=wide_dtype(x))
        drawn = _drawn(seeds, ps)
        rows = cast(x, thin) if any(a is not None and seed is None for a, seed in zip(as_, drawn, strict=True)) else x
        for a, part, seed, p in zip(as_, parts, drawn, ps, strict=True):
            if a is None:
                continue
            kept = rows if seed is None else drop(x, seed, p, thin)
            h[:, part] = torch.mm(kept, cast(a, thin).t())
            if seed is not None:
                h[:, part] *= dropout_scale(p)
    for y, part, b, lora_bias, scale in zip(ys, parts, bs, lora_biases, scales, strict=True):
        if b is not None:
            add_low_rank_(y, *with_bias(h[:, part], b, lora_bias), scale)
    return ys, h


def lora_group_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    ws: Sequence[Tensor | None],
    as_: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    h: Tensor | None,
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    want_dx: bool,
    want_das: Sequence[bool],
    want_dbs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx = Σ_i dy_i·w_i + mask_i/(1−p_i) ⊙ (dh_i·a_i), and da_i, db_i of every member; None unless wanted.

    dys: None where an output was not used: it adds nothing, and its da and db are zero.   x is read for das alone, h
    for dbs alone.   Returns dx: [M, K] in dy's dtype, das in the as', dbs in the bs' dtypes.
    """
    like = next(dy for dy in dys if dy is not None)
    dbs, dhs = _dy_pass(dys, bs, h, columns(as_), scales, want_dx or any(want_das), want_dbs)
    terms = [
        _Term(i, dh, a, scale if seed is None else scale * dropout_scale(p), seed, p)
        for i, (dh, a, scale, seed, p) in enumerate(zip(dhs, as_, scales, _drawn(seeds, ps), ps, strict=True))
        if dh is not None and a is not None
    ]
    das = [torch.zeros_like(a) if want and a is not None else None for want, a in zip(want_das, as_, strict=True)]
    if x is not None:
        _da(das, x, [term for term in terms if want_das[term.member]])
    dx: Tensor | None = None
    if want_dx:
        masked = _masked(terms, like.dtype)
        layers = [(dy, w) for dy, w in zip(dys, ws, strict=True) if dy is not None and w is not None]
        if layers:
            dx = pull_back(*layers, onto=masked)
        elif masked is not None:
            dx = cast(masked, like.dtype)
        else:
            K = next((t.shape[1] for t in (*as_, *ws) if t is not None), 0)
            dx = like.new_zeros((like.shape[0], K))
        _add_plain_(dx, [term for term in terms if term.seed is None])
    return dx, das, dbs


class _Term(NamedTuple):
    """A member's part of das and dx.   dh: [M, R] without its `scale`, which the next products bring in fp32."""

    member: int
    dh: Tensor
    a: Tensor
    scale: float
    seed: Tensor | None
    p: float


def _dy_pass(
    dys: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    h: Tensor | None,
    parts: Sequence[slice],
    scales: Sequence[float],
    want_dh: bool,
    want_dbs: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dbs and dhs, db_i = scale·dy_iᵀ·h_i and dh_i = dy_i·b_i, unscaled; dh None without an adapter or a dy."""
    dbs: list[Tensor | None] = []
    dhs: list[Tensor | None] = []
    for dy, b, part, scale, want_db in zip(dys, bs, parts, scales, want_dbs, strict=True):
        db = dh = None
        if b is not None and dy is not None:
            thin = thin_dtype(dy, b)
            dy_thin, b_thin = cast(dy, thin), cast(b, thin)
            if want_db and h is not None:
                db = cast(outer(dy_thin, cast(h[:, part], thin), b_thin, scale), b.dtype)
            if want_dh:
                dh = torch.mm(dy_thin, b_thin)
        elif b is not None and want_db:
            db = torch.zeros_like(b)
        dbs.append(db)
        dhs.append(dh)
    return dbs, dhs


def _da(das: list[Tensor | None], x: Tensor, terms: Sequence[_Term]) -> None:
    """da_i = dh_iᵀ·drop_i(x) for each term, in one product for all that do not drop."""
    for i, dh, a, scale, seed, p in terms:
        if seed is not None:
            thin = _thin(x, [a])
            da = torch.addmm(cast(a, thin), cast(dh, thin).t(), drop(x, seed, p, thin), beta=0, alpha=scale)
            das[i] = cast(da, a.dtype)
    plain = [term for term in terms if term.seed is None]
    if plain:
        thin = _thin(x, [term.a for term in plain])
        stacked = torch.cat([cast(term.dh, thin) for term in plain], 1)
        together = torch.mm(stacked.t(), cast(x, thin)).split([len(term.a) for term in plain])
        for term, da in zip(plain, together, strict=True):
            das[term.member] = cast(da.mul_(term.scale), term.a.dtype)


def _add_plain_(dx: Tensor, terms: Sequence[_Term]) -> None:
    """dx += Σ_i scale_i·(dh_i·a_i), in one product for all of one scale: dx is read and written, and rounded, once."""
    for scale in dict.fromkeys(term.scale for term in terms):
        dhs, as_ = zip(*((term.dh, term.a) for term in terms if term.scale == scale), strict=True)
        if len(dhs) == 1:
            add_low_rank_(dx, dhs[0], as_[0], scale)
        else:
            add_low_rank_(dx, torch.cat(dhs, 1), torch.cat(as_), scale)


def _masked(terms: Sequence[_Term], dtype: torch.dtype) -> Tensor | None:
    """Σ_i mask_i ⊙ scale_i·(dh_i·a_i) over the terms that drop, in dtype or wider."""
    total: Tensor | None = None
    for _, dh, a, scale, seed, p in terms:
        if seed is not None:
            part = drop_(low_rank(dh, a, scale, dtype), seed, p)
            total = part if total is None else total.add_(part)
    return total
