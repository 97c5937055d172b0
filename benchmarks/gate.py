"""The correctness gate: no timing is kept for a result that the tolerance policy of `tests/tolerance.py` refuses.

y, dx, da and db are held to float64 and to plain torch (PEFT's formulation, same dtypes). Under dropout each
implementation draws a mask of its own, so the gate reads it off: with w = 0, dx = mask/(1−p) ⊙ (dh·a) is zero exactly
where x was dropped. After the same `manual_seed` the real layer must draw that mask again, and float64 and plain torch
are computed under it. The mask must drop a share p of the elements, within six standard deviations; what it multiplies
the rest by is 1/(1−p), or that of the p that 16 bits hold, whichever da is nearer to.

With few rows the two errors are means of few roundings and their ratio is half chance, so a result that exceeds the
policy's factor, yet not by far, is drawn again many times: the geometric mean of its ratios is then what counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from tolerance import FACTOR, FACTOR_OF_ONE_AMONG_MANY, one_rounding, relative_error
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.layers import FLOOR, Build, Call
from fastlora import reference

SEED = 20260
DRAWS = 16
"""How often a result in doubt is drawn again: one ratio scatters by about a quarter at M = 1, their mean by 6 %."""


@dataclass(frozen=True)
class Operands:
    """One layer's tensors, random and of unit size, so that no branch hides another's error."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    scale: float
    p: float

    @classmethod
    def random(
        cls, M: int, K: int, N: int, R: int, main: torch.dtype, adapter: torch.dtype, p: float, device: torch.device
    ) -> Operands:
        def normal(*shape: int, dtype: torch.dtype = main, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(dtype)

        return cls(
            x=normal(M, K).requires_grad_(),
            w=normal(N, K, std=K**-0.5),
            a=nn.Parameter(normal(R, K, dtype=adapter, std=K**-0.5)),
            b=nn.Parameter(normal(N, R, dtype=adapter, std=R**-0.5)),
            dy=normal(M, N),
            scale=2.0,
            p=p,
        )

    def again(self) -> Operands:
        """Other operands of the same sizes and dtypes."""
        (M, K), (N, R) = self.x.shape, self.b.shape
        return Operands.random(M, K, N, R, self.x.dtype, self.a.dtype, self.p, self.x.device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.x, self.w, self.a, self.b, self.dy))

    def built(self, build: Build) -> Call | None:
        return build(self.x, self.w, None, self.a, self.b, self.scale, self.p)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.a, self.b


class Refused(AssertionError):
    """A result that the policy does not accept, and why."""


@dataclass(frozen=True)
class Drawn:
    """A dropout mask, and what its kept elements are multiplied by."""

    keep: Tensor
    grow: float


class Gate:
    """Judges implementations on one layer's operands.   seed: of the dropout masks."""

    def __init__(self, operands: Operands, seed: int = SEED) -> None:
        self.operands, self.seed = operands, seed
        self._twins: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def error(self, impl: str, build: Build, call: Call) -> float:
        """The largest relative error among the results.   call: what build made of the operands.   Raises Refused."""
        if impl == FLOOR:
            return self._frozen_error(call())
        errors = self._errors(build, call)
        for name, (error, baseline) in errors.items():
            if not error <= FACTOR_OF_ONE_AMONG_MANY * baseline:
                raise Refused(f"{name}: error {error:.2e}, allowed {FACTOR * baseline:.2e}")
        doubtful = {name for name, (error, baseline) in errors.items() if error > FACTOR * baseline}
        if doubtful:
            self._redraw(build, doubtful)
        return max(error for error, _ in errors.values())

    def _redraw(self, build: Build, doubtful: set[str]) -> None:
        logs: dict[str, float] = dict.fromkeys(doubtful, 0.0)
        for seed in range(self.seed + 1, self.seed + 1 + DRAWS):
            torch.manual_seed(seed)
            fresh = Gate(self.operands.again(), seed)
            call = fresh.operands.built(build)
            if call is None:
                raise Refused("it applies to these operands, and not to others like them")
            for name, (error, baseline) in fresh._errors(build, call).items():
                if name in doubtful:
                    logs[name] += math.log(max(error, baseline / 2) / baseline) / DRAWS  # an exact result is no licence
        for name, mean in logs.items():
            if not mean <= math.log(FACTOR):
                raise Refused(f"{name}: error {math.exp(mean):.2f} times plain torch's, on the mean of {DRAWS} draws")

    def _errors(self, build: Build, call: Call) -> dict[str, tuple[float, float]]:
        """Of each result, its relative error and plain torch's, which is at least one rounding over the factor."""
        t = self.operands
        drawn = self._mask(build) if t.p > 0 else None
        torch.manual_seed(self.seed)
        y = call()
        actual = _named(y, torch.autograd.grad(y, t.leaves, t.dy))
        exact, plain = self._expected(drawn)
        return {name: _compared(name, actual[name], plain[name], exact[name]) for name in exact}

    def _frozen_error(self, y: Tensor) -> float:
        t = self.operands
        (dx,) = torch.autograd.grad(y, t.x, t.dy)
        x, w, dy = t.x.detach().double(), t.w.double(), t.dy.double()
        return max(relative_error(y, linear(x, w)), relative_error(dx, dy @ w))

    def _mask(self, build: Build) -> Drawn:
        t = self.operands
        call = replace(t, w=torch.zeros_like(t.w)).built(build)
        if call is None:
            raise Refused("it applies to these operands, and not to the same with w = 0")
        torch.manual_seed(self.seed)
        dx, da = torch.autograd.grad(call(), (t.x, t.a), t.dy)
        keep = dx != 0
        spread = 6 * math.sqrt(t.p * (1 - t.p) / keep.numel())
        share = 1 - keep.double().mean().item()
        if abs(share - t.p) > spread + 2**-17:
            raise Refused(f"dropout: {share:.4f} of dx is zero, wanted {t.p} ± {spread:.4f}")
        with torch.no_grad():
            dh = (t.dy.double() @ t.b.double()) * t.scale
            unscaled = dh.t() @ torch.where(keep, t.x.double(), 0)
            grow = float((da * unscaled).sum() / unscaled.square().sum())
        return Drawn(keep, min((1 / (1 - t.p), reference.dropout_scale(t.p)), key=lambda s: abs(s - grow)))

    def _expected(self, drawn: Drawn | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(float64, plain torch); without dropout they are the same for all."""
        if drawn is not None or self._twins is None:
            twins = self._layer(drawn, torch.float64), self._layer(drawn, None)
            if drawn is not None:
                return twins
            self._twins = twins
        return self._twins

    def _layer(self, drawn: Drawn | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """PEFT's formulation under the mask, in dtype or each operand in its own."""
        t = self.operands
        x, a, b = (leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in t.leaves)
        w, dy = (u.to(dtype or u.dtype) for u in (t.w, t.dy))
        dropped = x.to(a.dtype)
        if drawn is not None:
            dropped = torch.where(drawn.keep, dropped * drawn.grow, 0)
        y = (linear(x, w) + linear(linear(dropped, a), b) * t.scale).to(x.dtype)
        return _named(y, torch.autograd.grad(y, (x, a, b), dy))


def _named(y: Tensor, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))


def _compared(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    if actual.dtype != plain.dtype:
        raise Refused(f"{name}: dtype {actual.dtype}, wanted {plain.dtype}")
    try:
        error = relative_error(actual, exact)
    except AssertionError as refusal:  # shapes, or what is finite, differ
        raise Refused(f"{name}: {refusal}") from refusal
    return error, max(relative_error(plain, exact), one_rounding(actual.dtype) / FACTOR)
