"""The autograd rules of several jobs that train in one batch, each on its own rows of one frozen layer.

Saved for backward: x (an alias), the jobs' h (fp32) and 8 bytes of seed each. Never the dropped x, never a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import dispatch, ops
from fastlora.checks import check_jobs, one_each
from fastlora.functional.rules import (
    draw_seed,
    dy_dtype,
    face,
    no_second_derivative,
    opaque,
    parted,
    standalone,
    traced,
)


def _stamp(jobs: Sequence[int], factors: Sequence[Tensor]) -> int:
    """What tells one mapping from another: whose rows are whose, and who the jobs are."""
    return hash((tuple(jobs), *(id(f) for f in factors if f.is_leaf and f.requires_grad)))


def _save(ctx: Any, x: Tensor, w: Tensor | None, inputs: tuple[Any, ...], h: Tensor, stamped: bool) -> None:
    """Keep what backward will read: x only for da, w only for dx, h only for db; stamped, what tells a recomputation
    under another mapping: 8 bytes."""
    as_, bs, lora_biases, seeds, ctx.jobs, ctx.scales, ctx.ps, ctx.backend = inputs
    need_a, need_b = any(a.requires_grad for a in as_), any(t.requires_grad for t in (*bs, *lora_biases))
    ctx.needs = x.requires_grad, need_a, need_b
    ctx.biased = [bias.numel() > 0 for bias in lora_biases]
    ctx.ranks = [len(a) for a in as_]
    ctx.stamp = _stamp(ctx.jobs, as_) if stamped else None
    ctx.save_for_backward(
        x if need_a else None,
        w if x.requires_grad else None,
        h if need_b else None,
        seeds if x.requires_grad or need_a else None,
        *as_,
        *bs,
        torch.tensor(ctx.stamp) if stamped else None,
    )


def _setup_linear(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor], stamped: bool = False) -> None:
    x, w, _, *rest = inputs
    _save(ctx, x, w, tuple(rest), output[1], stamped)


def _setup_update(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor], stamped: bool = False) -> None:
    y, x, *rest = inputs
    ctx.x_dtype, ctx.need_y, ctx.dy_dtype = x.dtype, y.requires_grad, dy_dtype(x, y.dtype, rest[0][0], rest[1][0])
    _save(ctx, x, None, tuple(rest), output[1], stamped)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, list[Any], list[Any], list[Any]]:
    """dh_j = scale_j·dy·b_j;  db_j = scale_j·dyᵀ·h_j;  da_j = dh_jᵀ·drop_j(x);  dx = dy·w + mask/(1−p) ⊙ (dh·a).

    Every sum of job j over its own rows.   Returns dx, das, dbs, dlora_biases.
    """
    count, needs = len(ctx.ranks), ctx.needs
    none: list[Any] = [None] * count
    if dy is None:
        return None, none, none, none
    x, w, h, seeds, *factors, stamp = ctx.saved_tensors  # which checkpointing lets a backward read only once
    if stamp is not None and int(stamp) != ctx.stamp:
        raise RuntimeError(
            "jobs: a checkpointed layer was recomputed with another mapping of rows to jobs than its forward had; "
            "call backward inside the same `use` as the forward"
        )
    if not any(needs):
        return None, none, none, none
    inputs = (
        dy, x, w, factors[:count], factors[count:], ctx.biased, h, seeds, ctx.jobs, ctx.scales, ctx.ps, *needs,
        ctx.backend,
    )  # fmt: skip
    dx, das, dbs, dlora_biases = None, none, none, none
    if opaque(dy):
        grads = iter(torch.ops.fastlora.jobs_backward(*inputs))
        dx, da, db = (next(grads) if need else None for need in needs)
    else:
        dx, da, db = ops.jobs_gradients(*inputs)
    if da is not None:
        das = list(da.split(ctx.ranks))
    if db is not None:
        N, dbs, dlora_biases, start = db.shape[1], [], [], 0
        for R, has in zip(ctx.ranks, ctx.biased, strict=True):
            dbs.append(db[start : start + R].view(N, R))
            start += R + has
            dlora_biases.append(db[start - 1] if has else None)
    return dx, das, dbs, dlora_biases


def _update_backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """As `_backward`, with the base's part of dx left to the base: dy passes through."""
    dx, *lists = _backward(ctx, None if dy is None else dy.to(ctx.dy_dtype))
    return (dy if ctx.need_y else None), (None if dx is None else dx.to(ctx.x_dtype)), *lists


class _JobsLinear(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.jobs_linear`, without the dispatcher's cost; its lists lie flat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, plain: tuple[Any, ...], *flat: Tensor) -> Tensor:
        inputs = (x, w, bias, *parted(flat, lists=3), *plain)
        output = face("jobs_linear", x)(*inputs)
        ctx.set_materialize_grads(False)
        _setup_linear(ctx, inputs, output, stamped=True)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        dx, *lists = _backward(ctx, dy)
        return dx, None, None, None, *(grad for grads in lists for grad in grads)


class _JobsUpdate(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.jobs_update`, without the dispatcher's cost; its lists lie flat."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, plain: tuple[Any, ...], *flat: Tensor) -> Tensor:
        inputs = (y, x, *parted(flat, lists=3), *plain)
        output = face("jobs_update", x)(*inputs)
        ctx.set_materialize_grads(False)
        _setup_update(ctx, inputs, output, stamped=True)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        base, dx, *lists = _update_backward(ctx, dy)
        return base, dx, None, *(grad for grads in lists for grad in grads)


def _standalone_linear(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    dx, *lists = _backward(ctx, dy)
    return dx, None, None, *lists, None, None, None, None, None


standalone("fastlora::jobs_linear", _setup_linear, _standalone_linear)
standalone(
    "fastlora::jobs_update", _setup_update, lambda ctx, dy: (*_update_backward(ctx, dy), None, None, None, None, None)
)
torch.library.register_autograd("fastlora::jobs_backward", no_second_derivative)


def _run(
    name: str, rule: type[torch.autograd.Function], head: tuple[Any, ...], lists: list[Any], *plain: Any
) -> Tensor:
    """The op through its cheapest face: traced, inside autograd, or bare."""
    flat = [t for tensors in lists for t in tensors]
    if traced():
        return getattr(torch.ops.fastlora, name)(*head, *lists, *plain)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*head, *flat)):
        return rule.apply(*head, plain, *flat)
    return face(name, head[0])(*head, *lists, *plain)[0]


def _prepared(
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None] | None,
    scalings: Sequence[float],
    jobs: Sequence[int],
    dropout_p: float | Sequence[float],
    training: bool,
    salts: Tensor | None,
    backend: str | None,
) -> tuple[list[list[Tensor]], tuple[Any, ...]]:
    """(as, bs, lora_biases) of the jobs that have rows, and the ops' other inputs: the mapping in their numbers."""
    count = len(lora_As)
    ps = [float(p) for p in one_each(dropout_p, count)]
    here = [job for job in range(count) if job in set(jobs)]
    number = {job: new for new, job in enumerate(here)} | {-1: -1}
    absent = x.new_empty(0)
    biases = [absent if t is None else t for t in lora_biases or [None] * count]
    seeds = None
    if training and any(ps[job] > 0 for job in here):
        salts = torch.arange(count, device=x.device) if salts is None else salts
        seeds = draw_seed(x) ^ (salts if len(here) == count else salts[torch.tensor(here, device=x.device)])
    lists = [[tensors[job] for job in here] for tensors in (lora_As, lora_Bs, biases)]
    kept = [ps[job] if training else 0.0 for job in here]
    scales = [float(scalings[job]) for job in here]
    return lists, (seeds, [number[job] for job in jobs], scales, kept, dispatch.backend_of(x, backend))


def jobs_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    jobs: Sequence[int],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    lora_biases: Sequence[Tensor | None] | None = None,
    salts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One frozen layer for several jobs, y = x·weightᵀ + bias + scaling_j·(drop_j(x)·lora_A_jᵀ·lora_B_jᵀ + lora_bias_j)
    on the rows of job j.

    x: [..., K], weight: [N, K], bias: [N] as in `lora_linear`.   lora_As: [R_j, K] of one dtype, lora_Bs: [N, R_j] of
    one, a rank each; lora_biases: [N] or None each.   scalings: a number a job.   jobs: the job of each request, −1 for
    the base alone; x has as many rows for each of them, one after the other.   dropout_p: one for all, or one a job.
    salts: [G] int64 on x's device, a number a job for its dropout: its mask is that of the seed drawn here ^ its salt,
    at [row within the job, col], so that no company changes it; the jobs' places in the list if None.
    Returns y: [..., N] in x's dtype. A job's gradients are those of its own rows; one without a row is no part of the
    graph, so its .grad stays None and its optimizer leaves it alone.   Saves x (an alias), the jobs' h and seeds.
    Raises ValueError, TypeError naming the argument that does not fit, RuntimeError for a second derivative.
    """
    autocast = check_jobs(x, weight, bias, lora_As, lora_Bs, scalings, jobs, dropout_p, lora_biases, salts)
    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
    if weight.requires_grad or (bias is not None and bias.requires_grad):  # a base that is trained too
        y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        return jobs_update(
            y, x, lora_As, lora_Bs, scalings, jobs, dropout_p=dropout_p, training=training, lora_biases=lora_biases,
            salts=salts, backend=backend,
        )  # fmt: skip
    if all(job < 0 for job in jobs):
        return linear(x, weight, None if bias is None else bias.to(x.dtype))
    lists, plain = _prepared(x, lora_As, lora_Bs, lora_biases, scalings, jobs, dropout_p, training, salts, backend)
    return _run("jobs_linear", _JobsLinear, (x, weight, bias), lists, *plain)


def jobs_update(
    y: Tensor,
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    jobs: Sequence[int],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    lora_biases: Sequence[Tensor | None] | None = None,
    salts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """As `jobs_linear` over any base output y: [..., N], of a quantised base too.   Returns a new tensor like y."""
    autocast = check_jobs(x, y, None, lora_As, lora_Bs, scalings, jobs, dropout_p, lora_biases, salts, update=True)
    if autocast is not None:
        x = x.to(autocast)
    if all(job < 0 for job in jobs):
        return y.clone()
    lists, plain = _prepared(x, lora_As, lora_Bs, lora_biases, scalings, jobs, dropout_p, training, salts, backend)
    return _run("jobs_update", _JobsUpdate, (y, x), lists, *plain)
