"""The autograd rule of the gated MLP: the activation is computed again in backward, and x's gradient written once.

Saved for backward: x (an alias), the outputs of gate and up, the h of each adapter (fp32, 4·M·R bytes) and one seed
each. Never the activation, nor its product with up, nor a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora import dispatch, ops
from fastlora.checks import check_gated
from fastlora.functional.group import apart, together
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
from fastlora.reference import Projection


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what backward will read: g and u for all but down's db and biases, x for das and dws of gate and up."""
    x, ws, biases, as_, bs, lora_biases, seeds, ctx.scales, ctx.ps, ctx.activation, ctx.backend = inputs
    ctx.bias_dtypes, ctx.lora_bias_dtypes = [t.dtype for t in biases], [t.dtype for t in lora_biases]
    lists = ws, biases, as_, bs, lora_biases
    before = x.requires_grad or any(t.requires_grad for tensors in lists for t in tensors[:2])
    need_z = as_[2].requires_grad or ws[2].requires_grad
    _, g, u, h, h_down = output
    ctx.save_for_backward(
        x if any(t.requires_grad for t in (*ws[:2], *as_[:2])) else None,
        g if before or need_z else None,
        u if before or need_z else None,
        h if any(b.requires_grad for b in bs[:2]) else None,
        h_down if bs[2].requires_grad else None,
        seeds,
        *(ws[:2] if x.requires_grad else [None, None]),
        ws[2] if before else None,
        *as_,
        *bs,
    )


def _backward(ctx: Any, dy: Tensor | None, needs: Sequence[Any]) -> list[Any]:
    """z = act(g) ⊙ u again;  dz is down's dx;  dg = dz ⊙ u ⊙ act'(g),  du = dz ⊙ act(g);  and dx is of both.

    needs: for x a bool, for each list three.   Returns the gradients in that order.
    """
    if dy is None:
        return [None, *([None] * 3 for _ in needs[1:])]
    need_x, need_ws, need_biases, need_as, need_bs, need_lora_biases = needs
    x, g, u, h, h_down, seeds, *factors = ctx.saved_tensors  # which checkpointing lets a backward read only once
    inner = any((*need_ws[:2], *need_biases[:2], *need_lora_biases[:2]))
    wants = need_x, need_as, need_bs, inner, need_ws[2]
    dx, dg, du, z = None, None, None, None
    das, dbs = [None] * 3, [None] * 3
    if need_x or inner or need_ws[2] or any(need_as) or any(need_bs):
        absent = dy.new_empty(0)
        tensors = [absent if t is None else t for t in factors]
        inputs = (
            dy, x, g, u, tensors[:3], tensors[3:6], tensors[6:], h, h_down, seeds, ctx.scales, ctx.ps, ctx.activation,
            *wants, ctx.backend,
        )  # fmt: skip
        if opaque(dy):
            grads = iter(torch.ops.fastlora.lora_gated_backward(*inputs))
            dx = next(grads) if need_x else None
            das, dbs = ([next(grads) if need else None for need in each] for each in (need_as, need_bs))
            dg, du = (next(grads), next(grads)) if inner else (None, None)
            z = next(grads) if need_ws[2] else None
        else:
            dx, das, dbs, dg, du, z = ops.gated_gradients(*inputs)
    douts = dg, du, dy
    dws = [outer(*pair) if need else None for need, *pair in zip(need_ws, douts, (x, x, z), strict=True)]
    dbiases = sums_of_rows(douts, need_biases, ctx.bias_dtypes, (1.0, 1.0, 1.0))
    return [dx, dws, dbiases, das, dbs, sums_of_rows(douts, need_lora_biases, ctx.lora_bias_dtypes, ctx.scales)]


class _LoRAGated(torch.autograd.Function):
    """The rule of `torch.ops.fastlora.lora_gated`, without the dispatcher's cost; its lists lie flat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor | None, scales: Any, ps: Any, *rest: Any) -> Tensor:
        activation, backend, *flat = rest
        inputs = (x, *parted(flat), seeds, scales, ps, activation, backend)
        output = face("lora_gated", x)(*inputs)
        ctx.set_materialize_grads(False)
        _setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        need_x, _, _, _, _, _, *flat = ctx.needs_input_grad
        dx, *lists = _backward(ctx, dy, (need_x, *parted(flat)))
        return dx, None, None, None, None, None, *(grad for grads in lists for grad in grads)


standalone(
    "fastlora::lora_gated",
    _setup,
    lambda ctx, dy: (*_backward(ctx, dy, ctx.needs_input_grad[:6]), None, None, None, None, None),
)

torch.library.register_autograd("fastlora::lora_gated_backward", no_second_derivative)


def lora_gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str,
    *,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The gated MLP, y = down(act(gate(x)) ⊙ up(x)), with a low-rank update in any of its three layers.

    x: [..., K] bf16/fp16/fp32 (fp64 on the torch backend), any strides.   gate, up: weights [I, K].   down: [N, I].
    Each is a `Projection`: weight, bias, lora_A and lora_B (None for a plain layer), scaling, lora_bias, dropout_p, as
    in `lora_linear`, with an independent mask when training.   activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or
    "relu2".   Under autocast x and the weights are cast to its dtype.
    Returns y: [..., N] in x's dtype.  Saves x (an alias), gate(x) and up(x): [M, I], each adapter's h (M·R fp32) and
    8 bytes of seed; the activation is computed again in backward. On torch few rows run layer by layer.
    Raises ValueError, TypeError naming the layer and the argument that does not fit.   (Shazeer 2020, "GLU variants")
    """
    layers = gate, up, down
    autocast = check_gated(x, gate, up, down, activation)
    where = dispatch.backend_for(x, backend)
    if not together(x, where, 2):
        return _apart(x, layers, activation, training, backend)
    weights = [layer[0] for layer in layers]
    if autocast is not None:
        x, weights = x.to(autocast), [w.to(autocast) for w in weights]
    absent = x.new_empty(0)
    scales: list[float] = []
    ps: list[float] = []
    biases: list[Tensor] = []
    as_: list[Tensor] = []
    bs: list[Tensor] = []
    tails: list[Tensor] = []
    for _, bias, a, b, scaling, lora_bias, p in layers:
        scale, factor, tail = (1.0, None, None) if b is None else fold(scaling, b, lora_bias)
        scales.append(scale)
        ps.append(float(p) if training and a is not None else 0.0)
        for tensors, t in ((biases, bias), (as_, a), (bs, factor), (tails, tail)):
            tensors.append(absent if t is None else t)
    seeds = draw_seed(x, 3) if any(ps) else None
    lists = (weights, biases, as_, bs, tails)
    if traced():
        y: Tensor = torch.ops.fastlora.lora_gated(x, *lists, seeds, scales, ps, activation, where)[0]
        return y
    flat = [t for tensors in lists for t in tensors]
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in flat)):
        y = _LoRAGated.apply(x, seeds, scales, ps, activation, where, *flat)
        return y
    y = face("lora_gated", x)(x, *lists, seeds, scales, ps, activation, where)[0]
    return y


def _apart(
    x: Tensor, layers: tuple[Projection, Projection, Projection], activation: str, training: bool, backend: str | None
) -> Tensor:
    """Layer by layer, where calls cost more than arithmetic."""
    members = [(w, bias, a, b, scaling, p, lora_bias) for w, bias, a, b, scaling, lora_bias, p in layers]
    g, u = apart(x, members[:2], training, backend)
    (y,) = apart(ops.activate(g, activation) * u, members[2:], training, backend)
    return y
