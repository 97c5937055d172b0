"""The one tolerance policy: no worse than plain torch, against float64.

A result is accepted when its relative Frobenius error against float64 is at most 1.25× the error that plain torch
(PEFT's formulation, same dtypes and precision setting, autocast off unless it is tested) makes on the same inputs.
There is no absolute tolerance. Where plain torch happens to be exact, one rounding of the result's dtype is allowed: in
16 bits uniform in half a unit of the last place, which is at most ε wide, so ε/√12 in the mean square; in fp32, whose
sums round at every step and in an order of their own, its bound of ε/2.

A result at the end of many layers amplifies roundings by chance, up or down: one ratio to plain torch's error then says
little either way. So whole models are drawn several times: the geometric mean of the ratios of all their results is
held to the same 1.25, and each single one to 16, which no wrong tensor can meet. The layers inside them are held to
1.25 one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 1.25
FACTOR_OF_ONE_AMONG_MANY = 16.0

Results = dict[str, Tensor]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ (Frobenius), in float64; ‖actual‖ itself where exact is zero.

    Positions where exact is not finite must be the same in actual (NaN for NaN, the same inf) and then drop out.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    exact = exact.detach().double()
    actual = actual.detach().double().to(exact.device)
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), "finite and non-finite positions differ"
    if not finite.all():
        assert torch.equal(actual.nan_to_num()[~finite].sign(), exact.nan_to_num()[~finite].sign())
        actual, exact = actual[finite], exact[finite]
    norm = exact.norm()
    return float((actual - exact).norm() / (norm if norm > 0 else 1.0))


def one_rounding(dtype: torch.dtype) -> float:
    """The relative Frobenius error of rounding a tensor once, at the most: ε/√12 in 16 bits, ε/2 for wider sums."""
    return torch.finfo(dtype).eps / (math.sqrt(12) if dtype.itemsize == 2 else 2)


def assert_close(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`actual` is at most FACTOR times as far from `exact` (float64) as `plain` is, or within one rounding."""
    error, baseline = relative_error(actual, exact), relative_error(plain, exact)
    allowed = max(FACTOR * baseline, one_rounding(actual.dtype))
    assert error <= allowed, f"{what}: error {error:.3e}, plain torch {baseline:.3e}, allowed {allowed:.3e}"


def assert_all_close(draws: list[tuple[Results, Results, Results]]) -> None:
    """Whole models: draws of (actual, plain, exact) results by name; errors below one rounding count as one."""
    logs = []
    for actual, plain, exact in draws:
        assert actual.keys() == plain.keys() == exact.keys(), sorted(actual.keys() ^ plain.keys())
        for what, value in actual.items():
            assert value.dtype == plain[what].dtype, f"{what}: dtype {value.dtype}, plain torch {plain[what].dtype}"
            rounding = one_rounding(value.dtype)
            error, baseline = (max(relative_error(t, exact[what]), rounding) for t in (value, plain[what]))
            allowed = FACTOR_OF_ONE_AMONG_MANY * baseline
            assert error <= allowed, f"{what}: error {error:.3e}, plain torch {baseline:.3e}"
            logs.append(math.log(error / baseline))
    mean = math.exp(sum(logs) / len(logs))
    assert mean <= FACTOR, f"errors are {mean:.2f} times plain torch's, on the mean of {len(logs)} results"


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    """Bit for bit: same shape, dtype and values (NaN equals NaN, −0 differs from nothing)."""
    assert actual is not None and expected is not None, f"got {actual}, wanted {expected}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, wanted {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan() if actual.is_floating_point() else False)
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} elements differ"
