"""The one tolerance policy: no worse than plain torch, against float64.

A result is accepted when its relative Frobenius error against float64 is at most 1.25× the error that plain torch
(PEFT's formulation, same dtypes and precision setting, autocast off unless it is tested) makes on the same inputs.
There is no absolute tolerance. Where plain torch happens to be exact, one rounding of the result's dtype is allowed:
an error of ε/2 relative to each element, hence to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.25


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ (Frobenius), in float64; ‖actual‖ itself where exact is zero.

    Positions where exact is not finite must be the same in actual (NaN for NaN, the same inf) and then drop out.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, wanted {tuple(exact.shape)}"
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), "finite and non-finite positions differ"
    if not finite.all():
        assert torch.equal(actual.nan_to_num()[~finite].sign(), exact.nan_to_num()[~finite].sign())
        actual, exact = actual[finite], exact[finite]
    norm = exact.norm()
    return float((actual - exact).norm() / (norm if norm > 0 else 1.0))


def assert_close(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "") -> None:
    """`actual` is at most FACTOR times as far from `exact` (float64) as `plain` is, or within one rounding."""
    error, baseline = relative_error(actual, exact), relative_error(plain, exact)
    allowed = max(FACTOR * baseline, torch.finfo(actual.dtype).eps / 2)
    assert error <= allowed, f"{what}: error {error:.3e}, plain torch {baseline:.3e}, allowed {allowed:.3e}"


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    """Bit for bit: same shape, dtype and values (NaN equals NaN, −0 differs from nothing)."""
    assert actual is not None and expected is not None, f"got {actual}, wanted {expected}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, wanted {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan() if actual.is_floating_point() else False)
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} elements differ"
