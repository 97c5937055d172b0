"""torch.ops.fastlora.*: the layer forward and backward as opaque ops, over the Triton kernels or the torch backend.

The only importer of fastlora_kernels. Every op takes `backend`: "torch", or for the kernels "triton" (the table picks
the strategy), "fused" or "split" (forced). Dropout is on when a `seed` is given. Leading dimensions of x are rows.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fastlora import eager

kernels: Any = None
if importlib.util.find_spec("triton") is not None:  # Linux only; the torch backend serves elsewhere
    import fastlora_kernels as kernels

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_lib = torch.library.Library("fastlora", "DEF")
_lib.define(
    "lora_linear(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, Tensor? lora_bias, Tensor? seed, "
    "float scale, float p, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "lora_update(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? lora_bias, Tensor? seed, "
    "float scale, float p, ScalarType dtype, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor? w, Tensor a, Tensor b, Tensor? h, Tensor? seed, float scale, float p, "
    "bool want_dx, bool want_da, bool want_db, str backend) -> Tensor[]"
)
_lib.define(
    "multi_update_(Tensor(a!)[] ys, Tensor x, Tensor a_pool, Tensor[] b_pools, Tensor start, Tensor rank, "
    "Tensor scaling, Tensor biased, Tensor order, Tensor tiles, Tensor counts, int width) -> ()"
)
_lib.define(
    "multi_linear(Tensor x, Tensor[] ws, Tensor?[] biases, Tensor a_pool, Tensor[] b_pools, Tensor start, Tensor rank, "
    "Tensor scaling, Tensor biased, Tensor slots, Tensor order, Tensor tiles, Tensor counts, int width) -> Tensor[]"
)


def triton_unavailable(x: Tensor) -> str | None:
    """Why the Triton kernels cannot run on x; None when they can."""
    if kernels is None:
        return "triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the kernels take bf16, fp16 and fp32, not {x.dtype}"
    if x.device.type == "cuda" and not kernels.INTERPRET:
        return None
    if x.device.type == "cpu" and kernels.INTERPRET:
        return None
    return f"there is no Triton driver for device type {x.device.type!r}"


def few_rows(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, lora_bias: Tensor | None, scale: float
) -> Tensor | None:
    """y of the torch backend without dropout, where PyTorch's own nodes save no more than our rule and cost less.

    So it is for few rows of one dtype on a CPU; None for all else.
    """
    dtype = x.dtype
    if (
        not x.is_cpu
        or x.numel() > eager.FEW_INPUTS
        or not (dtype is a.dtype is b.dtype)
        or (bias is not None and dtype is not bias.dtype)
        or (lora_bias is not None and dtype is not lora_bias.dtype)
    ):
        return None
    return eager.few_rows(x, w, bias, a, b, lora_bias, scale)


def _rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K], a view wherever the strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


_AS_IT_IS = contextlib.nullcontext()


def _plain(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off: the operands already have the dtypes they are to be multiplied in."""
    device = "cpu" if x.is_cpu else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


@torch.library.impl(_lib, "lora_linear", "CompositeExplicitAutograd")
def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y = x·wᵀ + bias + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias.

    x: [..., K], w: [N, K] of one dtype.   a: [R, K], b: [N, R], bias, lora_bias: [N], any float dtype.
    seed: [] int64 on x's device turns dropout p on.   Returns y: [..., N] in x's dtype, h = drop(x)·aᵀ: [M, R] fp32.
    """
    rows = _rows(x)
    with _plain(x):
        if backend == "torch":
            y, h = eager.lora_linear(rows, w, bias, a, b, lora_bias, seed, scale, p)
        else:
            y, h = kernels.lora_linear(rows, w, bias, a, b, lora_bias, seed, scale, p, backend)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])), h


@torch.library.register_fake("fastlora::lora_linear", lib=_lib)
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], w.shape[0])), _fake_h(x, a)


@torch.library.impl(_lib, "lora_update", "CompositeExplicitAutograd")
def lora_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y + scale·drop(x)·aᵀ·bᵀ + scale·lora_bias over any base output y: [..., N], in `dtype`; operands as above."""
    rows, base = _rows(x), _rows(y)
    with _plain(x):
        if backend == "torch":
            out, h = eager.lora_update(base, rows, a, b, lora_bias, seed, scale, p, dtype)
        else:
            out, h = kernels.lora_update(base, rows, a, b, lora_bias, seed, scale, p, dtype)
    return out.view(y.shape), h


@torch.library.register_fake("fastlora::lora_update", lib=_lib)
def _(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape, dtype=dtype), _fake_h(x, a)


def gradients(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, da, db, each None unless wanted; without w, dx is the low-rank term's alone.

    dy: [..., N], any strides.   x: [..., K], needed for da.   h: [M, R] fp32 as forward returned it, needed for db.
    w, a, b, seed, scale, p: as in forward.   Returns dx: [..., K] in dy's dtype, da: [R, K] in a's, db: [N, R] in b's.
    """
    rows, grads = _rows(x) if x is not None else None, _rows(dy)
    with _plain(dy):
        if backend == "torch":
            dx, da, db = eager.lora_backward(grads, rows, w, a, b, h, seed, scale, p, want_dx, want_da, want_db)
        else:
            dx, da, db = kernels.lora_backward(
                grads, rows, w, a, b, h, seed, scale, p, want_dx, want_da, want_db, backend
            )
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], a.shape[1])
    return dx, da, db


@torch.library.impl(_lib, "lora_backward", "CompositeExplicitAutograd")
def lora_backward(*inputs: Any) -> list[Tensor]:
    """The wanted ones of `gradients`, in order: an op's list has no place for None."""
    return [grad for grad in gradients(*inputs) if grad is not None]


@torch.library.register_fake("fastlora::lora_backward", lib=_lib)
def _(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    want_dx: bool,
    want_da: bool,
    want_db: bool,
    backend: str,
) -> list[Tensor]:
    grads = []
    if want_dx:
        grads.append(dy.new_empty((*dy.shape[:-1], a.shape[1])))
    return grads + [like.new_empty(like.shape) for want, like in ((want_da, a), (want_db, b)) if want]


def _fake_h(x: Tensor, a: Tensor) -> Tensor:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((rows, a.shape[0]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.impl(_lib, "multi_update_", "CompositeExplicitAutograd")
def multi_update_(
    ys: list[Tensor],
    x: Tensor,
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> None:
    """y += scaling·(x·aᵀ·bᵀ + lora_bias) in place, each row with its own adapter, for the layers that share x.

    ys: [..., N] each.   x: [..., K].   a_pool: [members, T, K], b_pools: [T, N]: rank rows.   start: [G].   rank,
    scaling, biased: [members, G].   order, tiles, counts: the rows' routing.   width: at least the largest rank.
    """
    with _plain(x):
        routes = kernels.Routes(order, tiles, counts)
        h = kernels.multi_shrink(_rows(x), a_pool, start, rank, width, routes)
        kernels.multi_expand([y.view(-1, y.shape[-1]) for y in ys], h, b_pools, start, rank, scaling, biased, routes)


@torch.library.register_fake("fastlora::multi_update_", lib=_lib)
def _(
    ys: list[Tensor],
    x: Tensor,
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> None:
    return None


@torch.library.impl(_lib, "multi_linear", "CompositeExplicitAutograd")
def multi_linear(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor | None],
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    slots: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> list[Tensor]:
    """x·wᵀ + bias and each row's own low-rank term, one launch a layer: for few rows.

    ws: [N, K] each, biases: [N] each or None.   slots: [M] int32, −1 for base only.   The rest as in `multi_update_`.
    Returns [..., N] each.
    """
    with _plain(x):
        rows = _rows(x)
        h = kernels.multi_shrink(rows, a_pool, start, rank, width, kernels.Routes(order, tiles, counts))
        layers = zip(ws, biases, b_pools, rank, scaling, biased, h.unbind(1), strict=True)
        ys = [
            kernels.multi_linear(rows, w, bias, part, b_pool, start, ranks, scale, extra, slots)
            for w, bias, b_pool, ranks, scale, extra, part in layers
        ]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


@torch.library.register_fake("fastlora::multi_linear", lib=_lib)
def _(
    x: Tensor,
    ws: list[Tensor],
    biases: list[Tensor | None],
    a_pool: Tensor,
    b_pools: list[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    slots: Tensor,
    order: Tensor,
    tiles: Tensor,
    counts: Tensor,
    width: int,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in ws]
