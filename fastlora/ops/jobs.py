"""Several jobs' rows in one batch as opaque ops: forward over a plain base or over any base's output, and backward.

`jobs` holds the job of each request, −1 for the base alone; x has the same number of rows for each request. What a job
lacks (a lora_bias) is an empty tensor: an op's list differentiates only where every entry is a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora import eager
from fastlora.ops.group import present
from fastlora.ops.library import fake_h, kernels, lib, plain, rows_of, shaped

_JOBS = (
    "Tensor[] as_, Tensor[] bs, Tensor[] lora_biases, Tensor? seeds, int[] jobs, float[] scales, float[] ps, "
    "str backend"
)
lib.define(f"jobs_linear(Tensor x, Tensor w, Tensor? bias, {_JOBS}) -> (Tensor, Tensor)")
lib.define(f"jobs_update(Tensor y, Tensor x, {_JOBS}) -> (Tensor, Tensor)")
lib.define(
    "jobs_backward(Tensor dy, Tensor? x, Tensor? w, Tensor[] as_, Tensor[] bs, bool[] biased, Tensor? h, "
    "Tensor? seeds, int[] jobs, float[] scales, float[] ps, bool want_dx, bool want_da, bool want_db, str backend) "
    "-> Tensor[]"
)


@torch.library.impl(lib, "jobs_linear", "CompositeExplicitAutograd")
def jobs_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias, and scale_j·(drop_j(x)·a_jᵀ·b_jᵀ + lora_bias_j) on the rows of job j.

    x: [..., K], w: [N, K] of one dtype.   as_: [R_j, K] of one dtype, bs: [N, R_j] of one.   seeds: [G] int64 on x's
    device; job j drops where p_j > 0, by Philox(seed_j)[row within the job, col].
    Returns y: [..., N] in x's dtype, h fp32: on the torch backend of own ranks and rows alone and flat, [M, widest]
    on the kernels.
    """
    rows = rows_of(x)
    factors = as_, bs, present(lora_biases), seeds, jobs, scales, ps
    with plain(x):
        y, h = (eager if backend == "torch" else kernels).jobs_linear(rows, w, bias, *factors)
    return shaped(y, *x.shape[:-1]), h


@torch.library.register_fake("fastlora::jobs_linear", lib=lib)
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], w.shape[0])), _fake_h(x, as_, jobs, backend)


@torch.library.impl(lib, "jobs_update", "CompositeExplicitAutograd")
def jobs_update(
    y: Tensor,
    x: Tensor,
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `jobs_linear` over any base output y: [..., N].   Returns a new tensor like y, and h."""
    factors = as_, bs, present(lora_biases), seeds, jobs, scales, ps
    with plain(x):
        out, h = (eager if backend == "torch" else kernels).jobs_update(rows_of(y), rows_of(x), *factors)
    return shaped(out, *y.shape[:-1]), h


@torch.library.register_fake("fastlora::jobs_update", lib=lib)
def _(
    y: Tensor,
    x: Tensor,
    as_: list[Tensor],
    bs: list[Tensor],
    lora_biases: list[Tensor],
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), _fake_h(x, as_, jobs, backend)


def jobs_gradients(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    as_: list[Tensor],
    bs: list[Tensor],
    biased: list[bool],
    h: Tensor | None,
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db, each None unless wanted; da and db hold all jobs', one after the other.

    dy: [..., N], any strides.   x: [..., K], needed for da.   w: None for the low-rank terms' dx alone.   biased:
    whether a job has a lora_bias.   h: as forward returned it, needed for db.   The rest as in `jobs_linear`.
    Returns dx: [..., K] in dy's dtype; da: [ΣR, K] in a's; db: [ΣR + biases, N] in b's, of each job the
    elements of [N, R] and then of its lora_bias.
    """
    rows, grads = rows_of(x) if x is not None else None, rows_of(dy)
    backward = (eager if backend == "torch" else kernels).jobs_backward
    with plain(dy):
        dx, da, db = backward(
            grads, rows, w, as_, bs, biased, h, seeds, jobs, scales, ps, want_dx, want_da, want_db
        )  # fmt: skip
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[-1])
    return dx, da, db


@torch.library.impl(lib, "jobs_backward", "CompositeExplicitAutograd")
def jobs_backward(*inputs: Any) -> list[Tensor]:
    """The wanted ones of `jobs_gradients`, in order: an op's list has no place for None."""
    return [grad for grad in jobs_gradients(*inputs) if grad is not None]


@torch.library.register_fake("fastlora::jobs_backward", lib=lib)
def _(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    as_: list[Tensor],
    bs: list[Tensor],
    biased: list[bool],
    h: Tensor | None,
    seeds: Tensor | None,
    jobs: list[int],
    scales: list[float],
    ps: list[float],
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> list[Tensor]:
    K, ranks = as_[0].shape[1], sum(a.shape[0] for a in as_)
    grads = [dy.new_empty((*dy.shape[:-1], K))] if want_dx else []
    grads += [as_[0].new_empty((ranks, K))] if want_da else []
    return grads + ([bs[0].new_empty((ranks + sum(biased), dy.shape[-1]))] if want_db else [])


def _fake_h(x: Tensor, as_: list[Tensor], jobs: list[int], backend: str) -> Tensor:
    if backend == "torch":
        rows = fake_h(x, 1)
        return rows.new_empty(rows.shape[0] // len(jobs) * sum(as_[job].shape[0] for job in jobs if job >= 0))
    return fake_h(x, -(-max(a.shape[0] for a in as_) // 16) * 16)
