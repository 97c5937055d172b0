"""The autograd rule of layers that share an input: one read of x for every shrink, one dx for all of them.

Saved for backward: x (an alias), the members' h side by side (fp32, 4·M·ΣR bytes) and one seed each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora import dispatch, ops
from fastlora.checks import check_group, check_list, one_each
from fastlora.functional.linear import lora_linear
from fastlora.functional.rules import (
    draw_seed,
    face,
    fold,
    no_second_derivative,
    opaque,
    outer,
    parted,
    standalone,
    sums_of_rows,
    traced,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Sequence[Tensor], Tensor]) -> None:
    """Keep what backward will read: x only for das and dws, ws only for dx, h only for dbs."""
    x, *lists, seeds, ctx.scales, ctx.ps, ctx.backend = inputs
    ws, biases, as_, bs, lora_biases = lists
    ctx.count = len(ws)
    ctx.bias_dtypes, ctx.lora_bias_dtypes = [t.dtype for t in biases], [t.dtype for t in lora_biases]
    need_x, need_a = x.requires_grad, any(a.requires_grad for a in as_)
    ctx.save_for_backward(
        x if need_a or any(w.requires_grad for w in ws) else None,
        output[1] if any(b.requires_grad for b in bs) else None,
        seeds if need_x or need_a else None,
        *(ws if need_x else [None] * ctx.count),
        *as_,
        *bs,
    )


def _backward(ctx: Any, dys: Sequence[Tensor | None], needs: Sequence[Any]) -> list[Any]:
    """dx = Σ_i dy_i·w_i + mask_i/(1−p_i) ⊙ (dh_i·a_i);  da_i = dh_iᵀ·drop_i(x);  db_i = scale_i·dy_iᵀ·h_i.

    needs: for x a bool, for each list a bool a member.   Returns the gradients in that order.
    """
    need_x, need_ws, need_biases, need_as, need_bs, need_lora_biases = needs
    # an output that nobody used leaves its factors without a gradient, as a layer by itself does: zero would move them
    need_as, need_bs = ([n and dy is not None for n, dy in zip(ns, dys, strict=True)] for ns in (need_as, need_bs))
    x, h, seeds, *factors = ctx.saved_tensors  # which checkpointing lets a backward read only once
    none: list[Any] = [None] * ctx.count
    dx, dws, das, dbs = None, none, none, none
    first = next((dy for dy in dys if dy is not None), None)
    if first is not None and (need_x or any(need_as) or any(need_bs)):
        absent = first.new_empty(0)
        ws, as_, bs = parted([absent if t is None else t for t in factors], lists=3)
        inputs = (
            [absent if dy is None else dy for dy in dys], x, ws, as_, bs, h, seeds, ctx.scales, ctx.ps,
            need_x, need_as, need_bs, ctx.backend,
        )  # fmt: skip
        if opaque(first):
            grads = iter(torch.ops.fastlora.lora_group_backward(*inputs))
            dx = next(grads) if need_x else None
            das, dbs = ([next(grads) if need else None for need in list_] for list_ in (need_as, need_bs))
        else:
            dx, das, dbs = ops.group_gradients(*inputs)
    if any(need_ws):
        dws = [outer(dy, x) if need and dy is not None else None for dy, need in zip(dys, need_ws, strict=True)]
    dbiases = sums_of_rows(dys, need_biases, ctx.bias_dtypes, [1.0] * ctx.count)
    return [dx, dws, dbiases, das, dbs, sums_of_rows(dys, need_lora_biases, ctx.lora_bias_dtypes, ctx.scales)]


class _LoRAGroup(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_group`, without the dispatcher's cost; its lists lie flat."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, scales: list[float], ps: list[float], backend: str, *flat: Any
    ) -> Any:
        inputs = (x, *parted(flat), seeds, scales, ps, backend)
        ys, h = face("lora_group", x)(*inputs)
        _setup(ctx, inputs, (ys, h))
        ctx.set_materialize_grads(False)
        if not x.requires_grad:  # as a layer by itself whose every input is frozen
            wanted = zip(ys, *parted(ctx.needs_input_grad[5:]), strict=True)
            ctx.mark_non_differentiable(*(y for y, *needs in wanted if not any(needs)))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        need_x, _, _, _, _, *flat = ctx.needs_input_grad
        dx, *lists = _backward(ctx, dys, (need_x, *parted(flat)))
        return dx, None, None, None, None, *(grad for grads in lists for grad in grads)


standalone(
    "fastlora::lora_group",
    _setup,
    lambda ctx, dys: (*_backward(ctx, dys, ctx.needs_input_grad[:6]), None, None, None, None),
)

torch.library.register_autograd("fastlora::lora_group_backward", no_second_derivative)


def together(x: Tensor, backend: str, members: int) -> bool:
    """Whether layers that share x: [..., K] run as a group: not where calls cost more than arithmetic."""
    return 1 < members <= ops.GROUP and (backend != "torch" or not dispatch.few_rows(x))


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float | Tensor],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    lora_biases: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """LoRA layers that share x: y_i = x·weight_iᵀ + bias_i + scaling_i·(drop_i(x)·lora_A_iᵀ·lora_B_iᵀ + lora_bias_i).

    Every member as in `lora_linear`, with an N, R, scaling and dropout of its own and an independent mask; where its
    lora_A and lora_B are None, y_i = x·weight_iᵀ + bias_i.   dropout_p: one probability for all, or one each.
    x is read once for all of lora_A·x, and dx is summed in one accumulator.   Returns a y: [..., N_i] for each member.
    Saves x (an alias), the members' h (M·ΣR fp32) and 8 bytes of seed each.
    Raises ValueError, TypeError naming the argument, and its place in the list, that does not fit.
    """
    count = check_list("weights", weights, "one [N, K] for each member")
    ps = one_each(dropout_p, count)
    added = [None] * count if lora_biases is None else lora_biases
    given = weights, biases, lora_As, lora_Bs, scalings, ps, added
    autocast = check_group(x, *given)
    where = dispatch.backend_for(x, backend)
    if not together(x, where, count) or all(a is None for a in lora_As):
        return apart(x, list(zip(*given, strict=True)), training, backend)
    if autocast is not None:
        x, weights = x.to(autocast), [w.to(autocast) for w in weights]
    probabilities = [float(p) if training and a is not None else 0.0 for p, a in zip(ps, lora_As, strict=True)]
    seeds = draw_seed(x, count) if any(probabilities) else None
    absent = x.new_empty(0)
    scales: list[float] = []
    bs: list[Tensor | None] = []
    tails: list[Tensor | None] = []
    for b, scaling, lora_bias in zip(lora_Bs, scalings, added, strict=True):
        scale, factor, tail = (1.0, None, None) if b is None else fold(scaling, b, lora_bias)
        scales.append(scale)
        bs.append(factor)
        tails.append(tail)
    lists = [[absent if t is None else t for t in tensors] for tensors in (weights, biases, lora_As, bs, tails)]
    return _run(x, lists, seeds, scales, probabilities, where)


def _run(
    x: Tensor, lists: list[list[Tensor]], seeds: Tensor | None, scales: list[float], ps: list[float], backend: str
) -> tuple[Tensor, ...]:
    """The op through its cheapest face: traced, inside autograd, or bare."""
    inputs = (x, *lists, seeds, scales, ps, backend)
    if traced():
        return tuple(torch.ops.fastlora.lora_group(*inputs)[0])
    flat = [t for tensors in lists for t in tensors]
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in flat)):
        ys: tuple[Tensor, ...] = _LoRAGroup.apply(x, seeds, scales, ps, backend, *flat)
        return ys
    return tuple(face("lora_group", x)(*inputs)[0])


def apart(x: Tensor, members: Sequence[tuple[Any, ...]], training: bool, backend: str | None) -> tuple[Tensor, ...]:
    """One after the other, where a group of them costs more than it saves."""
    return tuple(
        linear(x, weight, None if bias is None else bias.to(x.dtype))
        if a is None
        else lora_linear(
            x, weight, bias, a, b, scaling, dropout_p=p, training=training, lora_bias=lora_bias, backend=backend
        )
        for weight, bias, a, b, scaling, p, lora_bias in members
    )
