"""The implementations of layers that share an input: q, k, v side by side, and the gated MLP.

    build(block, p) -> Callable[[], tuple[Tensor, ...]] | None

A call computes the block's outputs in training mode, differentiable to x and every a and b, with fresh dropout masks;
None says that the implementation does not apply. The published formulations are written here in plain torch, and keep
the order of their products, what they save and what they add in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import fastlora
from benchmarks import layers
from benchmarks.layers import FLOOR

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Block:
    """One block's tensors, random and of unit size.

    kind: "qkv", three outputs; or "mlp", down(silu(gate(x)) ⊙ up(x)), one.   x: [M, K].   ws: [N_i, K_i].
    as_: [R, K_i], bs: [N_i, R].   dys: of each output.
    """

    kind: str
    x: Tensor
    ws: tuple[Tensor, ...]
    as_: tuple[nn.Parameter, ...]
    bs: tuple[nn.Parameter, ...]
    dys: tuple[Tensor, ...]
    scale: float = 2.0

    @classmethod
    def random(
        cls,
        kind: str,
        M: int,
        sizes: list[tuple[int, int]],
        R: int,
        main: torch.dtype,
        adapter: torch.dtype,
        device: Any,
    ) -> Block:
        def normal(*shape: int, dtype: torch.dtype = main, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(dtype)

        return cls(
            kind,
            normal(M, sizes[0][0]).requires_grad_(),
            tuple(normal(N, K, std=K**-0.5) for K, N in sizes),
            tuple(nn.Parameter(normal(R, K, dtype=adapter, std=K**-0.5)) for K, _ in sizes),
            tuple(nn.Parameter(normal(N, R, dtype=adapter, std=R**-0.5)) for _, N in sizes),
            tuple(normal(M, N) for _, N in (sizes if kind == "qkv" else sizes[-1:])),
        )

    def again(self) -> Block:
        """Another of the same sizes and dtypes."""
        sizes = [(w.shape[1], w.shape[0]) for w in self.ws]
        R = self.as_[0].shape[0]
        return Block.random(self.kind, len(self.x), sizes, R, self.x.dtype, self.as_[0].dtype, self.x.device)

    def doubled(self) -> Block:
        """The same in float64."""
        x, ws, as_, bs, dys = (
            self.x.detach().double().requires_grad_(),
            *(tuple(t.detach().double() for t in tensors) for tensors in (self.ws, self.as_, self.bs, self.dys)),
        )
        return Block(self.kind, x, ws, tuple(map(nn.Parameter, as_)), tuple(map(nn.Parameter, bs)), dys, self.scale)

    @property
    def leaves(self) -> Outputs:
        return self.x, *self.as_, *self.bs

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.x, *self.ws, *self.as_, *self.bs, *self.dys))

    def through(self, layer: Callable[[int, Tensor], Tensor]) -> Outputs:
        """The block's outputs, layer(i, x) being its i-th linear layer."""
        if self.kind == "qkv":
            return tuple(layer(i, self.x) for i in range(len(self.ws)))
        return (layer(2, silu(layer(0, self.x)) * layer(1, self.x)),)


Build = Callable[[Block, float], Call | None]


def frozen(block: Block, p: float) -> Call:
    return lambda: block.through(lambda i, x: linear(x, block.ws[i]))


def peft(block: Block, p: float) -> Call:
    made = _model(block, p)
    return lambda: made()


def peft_compiled(block: Block, p: float) -> Call:
    return torch.compile(peft(block, p), dynamic=False)


def peft_style(block: Block, p: float) -> Call:
    """PEFT's formulation without its modules."""

    def layer(i: int, x: Tensor) -> Tensor:
        a, b = block.as_[i], block.bs[i]
        h = linear(nn.functional.dropout(x.to(a.dtype), p), a)
        return (linear(x, block.ws[i]) + linear(h, b) * block.scale).to(x.dtype)

    return lambda: block.through(layer)


def patched(block: Block, p: float) -> Call:
    model = _model(block, p)
    fastlora.patch(model, strict=True, inputs={"x": block.x.detach()})
    return lambda: model()


def ours(block: Block, p: float) -> Call:
    n = len(block.ws)
    if block.kind == "qkv":
        return lambda: fastlora.functional.lora_linear_group(
            block.x, block.ws, [None] * n, block.as_, block.bs, [block.scale] * n, dropout_p=p
        )
    gate, up, down = (
        fastlora.functional.Projection(w, None, a, b, block.scale, None, p)
        for w, a, b in zip(block.ws, block.as_, block.bs, strict=True)
    )
    return lambda: (fastlora.functional.lora_gated_mlp(block.x, gate, up, down, "silu"),)


class _Model(nn.Module):
    """The block as a model's author writes it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.kind, self.x = block.kind, block.x
        self.act = nn.SiLU()
        for name, w in zip("abc", block.ws, strict=True):
            self.add_module(name, layers.base_of(w))

    def forward(self, x: Tensor | None = None) -> Outputs:
        x = self.x if x is None else x
        if self.kind == "qkv":
            return self.a(x), self.b(x), self.c(x)
        return (self.c(self.act(self.a(x)) * self.b(x)),)


def _model(block: Block, p: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    R = block.as_[0].shape[0]
    config = LoraConfig(r=R, lora_alpha=block.scale * R, lora_dropout=p, target_modules=["a", "b", "c"])
    model = inject_adapter_in_model(config, _Model(block)).train()
    for name, a, b in zip("abc", block.as_, block.bs, strict=True):
        layer = getattr(model, name)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return model


class _SharedDx(torch.autograd.Function):
    """q, k, v in one node: separate matmuls, updates added in place, dx accumulated in place; x·a computed again.

    (Unsloth's LoRA_QKV, Axolotl's likewise.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *factors: Tensor) -> Outputs:
        ctx.save_for_backward(x, *factors)
        ctx.scale = scale
        return tuple(linear(x, w).addmm_(x @ a.t(), b.t(), alpha=scale) for w, a, b in _threes(factors))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        dx, grads = None, []
        for dy, (w, a, b) in zip(dys, _threes(factors), strict=True):
            dh = dy @ b
            da = torch.empty_like(a).addmm_(dh.t(), x, alpha=ctx.scale, beta=0)
            db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), alpha=ctx.scale, beta=0)
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(dh, a, alpha=ctx.scale)
            grads += [None, da, db]
        return dx, None, *grads


class _RecomputedGate(torch.autograd.Function):
    """The gated MLP in one node: gate and up outputs saved, the activation and x·a computed again.

    (Unsloth's LoRA_MLP, Axolotl's likewise.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *factors: Tensor) -> Tensor:
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = _threes(factors)
        gate = linear(x, wg).addmm_(x @ ag.t(), bg.t(), alpha=scale)
        up = linear(x, wu).addmm_(x @ au.t(), bu.t(), alpha=scale)
        ctx.save_for_backward(x, gate, up, *factors)
        ctx.scale = scale
        z = silu(gate) * up
        return linear(z, wd).addmm_(z @ ad.t(), bd.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *factors = ctx.saved_tensors
        (wg, ag, bg), (wu, au, bu), (wd, ad, bd) = _threes(factors)
        act = silu(gate)
        z = act * up
        dhd = dy @ bd
        dz = (dy @ wd).addmm_(dhd, ad, alpha=ctx.scale)
        dgate, dup = torch.ops.aten.silu_backward(dz * up, gate), dz * act
        dhg, dhu = dgate @ bg, dup @ bu
        grads: list[Tensor | None] = []
        for grad, dh, inner, a, b in ((dgate, dhg, x, ag, bg), (dup, dhu, x, au, bu), (dy, dhd, z, ad, bd)):
            da = torch.empty_like(a).addmm_(dh.t(), inner, alpha=ctx.scale, beta=0)
            db = torch.empty_like(b).addmm_(grad.t(), inner @ a.t(), alpha=ctx.scale, beta=0)
            grads += [None, da, db]
        dx = (dgate @ wg).addmm_(dhg, ag, alpha=ctx.scale)
        dx.addmm_(dup, wu).addmm_(dhu, au, alpha=ctx.scale)
        return dx, None, *grads


def _threes(flat: Any) -> list[tuple[Any, Any, Any]]:
    return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def unsloth_style(block: Block, p: float) -> Call | None:
    if p > 0 or block.as_[0].dtype != block.x.dtype:
        return None
    flat = [t for three in zip(block.ws, block.as_, block.bs, strict=True) for t in three]
    if block.kind == "qkv":
        return lambda: _SharedDx.apply(block.x, block.scale, *flat)
    return lambda: (_RecomputedGate.apply(block.x, block.scale, *flat),)


def shared_shrink(block: Block, p: float) -> Call | None:
    """One product with the stacked a for q, k and v, and so one dropout mask for all of them."""
    if block.kind != "qkv":
        return None

    def call() -> Outputs:
        a = torch.cat(block.as_)
        inner = nn.functional.dropout(block.x.to(a.dtype), p)
        parts = linear(inner, a).split([len(each) for each in block.as_], -1)
        return tuple(
            (linear(block.x, w) + linear(h, b) * block.scale).to(block.x.dtype)
            for w, b, h in zip(block.ws, block.bs, parts, strict=True)
        )

    return call


IMPLS: dict[str, Build] = {
    FLOOR: frozen,
    **({"peft": peft, "peft-compiled": peft_compiled} if layers.HAS_PEFT else {"peft-style": peft_style}),
    "unsloth-style": unsloth_style,
    "shared-shrink": shared_shrink,
    "fastlora": ours,
    **({"fastlora-patched": patched} if layers.HAS_PEFT else {}),
}
