"""Many adapters in one batch, in plain PyTorch operators whose number does not depend on how many."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.eager.base import native
from fastlora.eager.thin import wide_dtype


def multi_update_(
    ys: list[Tensor],
    x: Tensor,
    requests: int,
    rows: Tensor | None,
    a: Tensor,
    bs: list[Tensor],
    biases: list[Tensor | None],
) -> None:
    """y += x·aᵀ·b + bias in place, each request with its own factors, for layers that share x; no loop over adapters.

    ys: [..., N] each, x: [..., K], as many rows for each of `requests`.   rows: the requests that have an adapter, None
    for all.   a: [B, members·width, K], bs: [B, width, N], scaled, biases: [B, 1, N], in the order of those requests;
    B = 1 where they share one adapter.
    """
    B, K = len(a), x.shape[-1]
    mine = x if rows is None else x.reshape(requests, -1, K)[rows]
    tokens = mine.reshape(B, -1, K)  # one adapter for all makes one long row
    if tokens.dtype != a.dtype or not native(tokens):
        thin = torch.promote_types(wide_dtype(tokens), a.dtype)
        tokens, a = tokens.to(thin), a.to(thin)
    if tokens.shape[1] == 1:  # one token a request: 50 GB/s of factors this way round, 30 the other
        h = torch.bmm(a, tokens.transpose(1, 2)).transpose(1, 2)
    else:
        h = torch.bmm(tokens, a.transpose(1, 2))
    parts = h.split(a.shape[1] // len(ys), 2) if len(ys) > 1 else (h,)
    for y, part, b, bias in zip(ys, parts, bs, biases, strict=True):
        N = y.shape[-1]
        target = y if rows is None else y.view(requests, -1, N)[rows]
        flat = target.view(B, -1, N)
        if flat.dtype == b.dtype == part.dtype:
            flat.baddbmm_(part, b)
            if bias is not None:
                flat.add_(bias)
        else:
            sums = torch.baddbmm(flat.to(b.dtype), part.to(b.dtype), b)
            flat.copy_(sums if bias is None else sums.add_(bias))
        if rows is not None:
            y.view(requests, -1, N).index_copy_(0, rows, target)
