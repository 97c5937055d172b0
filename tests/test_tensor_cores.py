"""Long sums on tensor cores, which truncate: no worse than plain fp32, compiled or interpreted with that arithmetic."""

from __future__ import annotations

import interpreting
import numpy as np
import plain
import pytest
from operands import launch_thin, layer, twins
from tolerance import assert_close

from fastlora import reference
from fastlora_kernels import Tile

LONG = 8192
"""The rows of a batch, at which an H200 erred by 1.3e-5 to 2.9e-5 where plain fp32 errs by 8e-7."""


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mix", ["fp32", "bf16", "bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("sizes", [(LONG, 33, 40), (20, LONG, 8), (20, 8, LONG)], ids=["rows", "features", "outputs"])
def test_a_long_sum(sizes: tuple[int, int, int], mix: str, device: str) -> None:
    """h and dh over features and outputs, da and db over rows: beside their fp32 twins, where those have fp32 sums."""
    t = layer(mix, 5, device, *sizes)
    fp32 = t.map(lambda v: v.float())
    exact, usual, ours = twins(reference, t.map(lambda v: v.double())), twins(plain, fp32), launch_thin(t, Tile(64, 64))
    for name, value in ours.items():
        assert_close(value, usual[name].to(value.dtype), exact[name], name)


def test_what_is_added_in_a_tensor_core_is_cut_off() -> None:
    """Sixteen terms exactly, then towards zero; a sum that runs on loses what rounding would keep."""
    halves = np.full(16, 2.0**-25)
    assert interpreting._towards_zero(1 + halves.sum()) == 1 + 2.0**-21
    for total in (1 + 2.0**-24 * 1.5, -1 - 2.0**-24 * 1.5):
        assert interpreting._towards_zero(np.float64(total)) == np.sign(total)
        assert np.float32(total) != np.sign(total)
    terms, cut = np.random.default_rng(0).random(LONG), np.float64(0)
    for term in terms:
        cut = interpreting._towards_zero(cut + term)
    rounded = terms.astype(np.float32).cumsum(dtype=np.float32)[-1]
    assert abs(cut - terms.sum()) > 10 * abs(rounded - terms.sum())
