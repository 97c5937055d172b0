"""Layers that share one input in launches: x is read once for every member's h and once for every da, dx written once.

A group has up to three members (q, k, v; gate, up), each with N, R, scale and dropout of its own; a member without an
adapter (`a` None) is a frozen layer. h is one buffer, a member's columns behind those of the members before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora_kernels.device import arch
from fastlora_kernels.dropout import bits_for
from fastlora_kernels.dy_pass import group_dy_pass
from fastlora_kernels.expand import group_dx, group_low_rank_dx
from fastlora_kernels.linear import base_linear, chosen, expand_by
from fastlora_kernels.members import columns
from fastlora_kernels.overlap import aside, mark, pays
from fastlora_kernels.shrink import group_shrink
from fastlora_kernels.x_pass import group_x_pass

Optional = Sequence[Tensor | None]
"""One a member."""


def group_linear(
    x: Tensor,
    ws: Sequence[Tensor],
    biases: Optional,
    as_: Optional,
    bs: Optional,
    lora_biases: Optional,
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    how: str,
) -> tuple[list[Tensor], Tensor]:
    """y_i = x·w_iᵀ + bias_i + scale_i·drop_i(x)·a_iᵀ·b_iᵀ + scale_i·lora_bias_i, for each of up to three members.

    x: [M, K].   ws: [N, K] each.   biases, lora_biases: [N] or None each.   as_: [R, K] and bs: [N, R] each, None for
    a member without an adapter.   seeds: [members] int64, one a member; None where nobody drops.   ps: a dropout
    probability each.   how: "fused", "split", or "triton" (the table decides, member by member).
    Returns ys: [M, N] each in x's dtype, and h: [M, ΣR] fp32.
    """
    h = group_shrink(x, as_, ps=ps, seeds=seeds)
    ys = []
    for w, bias, part, b, lora_bias, scale in zip(ws, biases, columns(h, as_), bs, lora_biases, scales, strict=True):
        if part is None or b is None:
            ys.append(base_linear(x, w, bias))
        else:
            ys.append(expand_by(x, w, bias, part, b, lora_bias, scale, how))
    return ys, h


def group_backward(
    dys: Optional,
    x: Tensor | None,
    ws: Optional,
    as_: Optional,
    bs: Optional,
    h: Tensor | None,
    seeds: Tensor | None,
    scales: Sequence[float],
    ps: Sequence[float],
    want_dx: bool,
    want_das: Sequence[bool],
    want_dbs: Sequence[bool],
    how: str,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dx = Σ_i (dy_i·w_i + mask_i/(1−p_i) ⊙ (dh_i·a_i)), and da_i, db_i of each member; only what is wanted.

    dys: [M, N] each, None for an output that nobody used: no work, and zeros where its da_i or db_i is wanted.
    x: [M, K], read for the das alone.   ws: read for dx alone.   h: [M, ΣR] fp32 as forward left it, read for the dbs
    alone.   The rest as in `group_linear`.
    Returns dx: [M, K] in the dys' dtype (None where not wanted, or with no dy at all), das, dbs in their a's and b's.
    """
    want_da = [wanted and a is not None for a, wanted in zip(as_, want_das, strict=True)]
    dhs, dbs = _of_dys(dys, as_, bs, h, scales, [want_dx or wanted for wanted in want_da], want_dbs)
    dtypes = [a.dtype if a is not None else torch.float32 for a in as_]
    for_das = [dh if wanted and x is not None else None for dh, wanted in zip(dhs, want_da, strict=True)]
    das: list[Tensor | None] = [None] * len(as_)
    grad, since, pending = None, None, any(dh is not None for dh in for_das)
    used = [(dy, w) for dy, w in zip(dys, ws, strict=True) if dy is not None and w is not None]
    if want_dx and used:
        outs, rows = [dy for dy, _ in used], [w for _, w in used]
        N, R = sum(w.shape[0] for w in rows), sum(dh.shape[1] for dh in dhs if dh is not None)
        kernel = "dx" if len(used) == 1 else "group_dx"
        drops = [p > 0 and seeds is not None and dh is not None for p, dh in zip(ps, dhs, strict=True)]
        fused = R > 0 and chosen(kernel, outs[0], rows[0].shape[1], N, R, how, sum(drops)) == "fused"
        overlaps, bits = fused and pending and pays(arch(outs[0])), None
        if x is not None and not overlaps:
            bits = bits_for(x, drops, [dh is not None for dh in for_das])
        if x is not None and bits is not None:
            das, pending = group_x_pass(x, for_das, dtypes, ps=ps, seeds=seeds, bits=bits), False
        since = mark(outs[0], overlaps)
        if fused:
            grad = group_dx(outs, rows, dhs, as_, ps=ps, seeds=seeds, bits=bits)
        else:
            if R > 0:
                grad = group_low_rank_dx(dhs, as_, outs[0].dtype, ps=ps, seeds=seeds, bits=bits)
            for dy, w in used:
                grad = torch.mm(dy, w) if grad is None else grad.addmm_(dy, w)
    if x is not None and pending:
        with aside(x, since):
            das = group_x_pass(x, for_das, dtypes, ps=ps, seeds=seeds)
        if since is not None:
            for da in das:
                if da is not None:  # their memory is the second stream's
                    da.record_stream(torch.cuda.current_stream(da.device))
    return grad, _or_zeros(das, as_, want_das), _or_zeros(dbs, bs, want_dbs)


def _of_dys(
    dys: Optional,
    as_: Optional,
    bs: Optional,
    h: Tensor | None,
    scales: Sequence[float],
    want_dh: Sequence[bool],
    want_db: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(dh_i, db_i) of the members that have a dy and an adapter, in one launch; None for the others."""
    hs = columns(h, as_)
    both = [(i, dy, b) for i, (dy, b) in enumerate(zip(dys, bs, strict=True)) if dy is not None and b is not None]
    dhs: list[Tensor | None] = [None] * len(dys)
    dbs: list[Tensor | None] = [None] * len(dys)
    if both:
        at = [i for i, _, _ in both]
        dh, found = group_dy_pass(
            [dy for _, dy, _ in both], [hs[i] for i in at], [b for _, _, b in both], [scales[i] for i in at],
            want_dh=[want_dh[i] for i in at], want_db=[want_db[i] for i in at],
        )  # fmt: skip
        for i, part, db in zip(at, columns(dh, [as_[i] for i in at]), found, strict=True):
            dhs[i], dbs[i] = part if want_dh[i] else None, db
    return dhs, dbs


def _or_zeros(grads: Optional, factors: Optional, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients, with zeros for those that are wanted and that nothing flowed into."""
    return [
        f.new_zeros(f.shape) if grad is None and f is not None and want else grad
        for grad, f, want in zip(grads, factors, wanted, strict=True)
    ]
