"""The frozen layer's own products on a CPU, x·wᵀ and dy·w, in fp32 where it has no matmul of their 16 bits.

Without AVX-512 torch multiplies bf16 and fp16 one by one: at M = 512, K = 1024, N = 2048 a forward takes 114 ms where
fp32 takes 16, and a backward 2862 ms. There w is copied to fp32 a band at a time, and the sum is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.nn.functional import linear

WIDE_ROWS = 16
"""M from which a forward repays the copy of w: with 8 rows both take 3 ms."""

WIDE_PRODUCTS = 2**14
"""M·K·N from which a backward does: there both take 20 µs, whatever M is."""

GEMM_ROWS = 4
"""M from which BLAS adds a product to what is there at the end; with fewer it starts there, at twice the error."""

BAND = 2**22
"""Elements of w that are copied at once: 16 MiB."""


@lru_cache
def has_matmul(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies dtype on this CPU."""
    if dtype.itemsize != 2:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def native(t: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether products of dtype, t's unless given, run in it at their speed where t is; a GPU's do."""
    return has_matmul(dtype or t.dtype) or not t.is_cpu


def as_rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K], a view wherever the strides allow; of K = 0 too, where a −1 for M could be any number."""
    if x.dim() == 2:
        return x
    *batch, K = x.shape
    return x.reshape(-1 if K else math.prod(batch), K)  # flatten knows no is_grads_batched


def batched(t: Tensor) -> bool:
    """Whether t stands for many, as dy does under is_grads_batched: one tensor's place has no room for them."""
    return is_legacy_batchedtensor(t) or is_batchedtensor(t)


def _bands(w: Tensor) -> list[slice]:
    """Rows of w: [N, K] that are copied together."""
    step = max(BAND // max(w.shape[1], 1), 1)
    return [slice(start, start + step) for start in range(0, max(w.shape[0], 1), step)]


def _widened(dy: Tensor, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(dy, w) in fp32, band by band."""
    bands = _bands(w)
    if len(bands) == 1:
        return iter([(dy.float(), w.float())])
    return ((dy[:, band].float(), w[band].float()) for band in bands)


def project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·wᵀ + bias in x's dtype.   x: [..., K]."""
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if native(x) or x.numel() < WIDE_ROWS * x.shape[-1]:
        return linear(x, w, bias)
    wide, bands = x.float(), _bands(w)
    if len(bands) == 1:
        return linear(wide, w.float(), None if bias is None else bias.float()).to(x.dtype)
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    for band in bands:
        y[..., band] = linear(wide, w[band].float(), None if bias is None else bias[band].float())
    return y


def pull_back(*layers: tuple[Tensor, Tensor], onto: Tensor | None = None) -> Tensor:
    """dx = Σ dy·w over the layers' (dy: [M, N], w: [N, K]), one at least, in dy's dtype.

    onto: [M, K], in dy's dtype or wider: added, and overwritten.
    """
    (dy, w), *others = layers
    if native(dy) or dy.numel() * w.shape[1] < WIDE_PRODUCTS:
        if onto is not None and onto.dtype is dy.dtype and len(dy) >= GEMM_ROWS:
            dx, onto = onto.addmm_(dy, w), None
        else:
            dx = dy.mm(w)
        for dy, w in others:
            dx.addmm_(dy, w)
        return dx if onto is None else dx.add_(onto)
    bands = (band for layer in layers for band in _widened(*layer))  # one copied at a time
    wide = torch.mm(*next(bands)) if onto is None else onto.float()
    for band in bands:
        wide.addmm_(*band)
    return wide.to(dy.dtype)
