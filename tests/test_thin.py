"""Products with thin factors on a CPU, beside float64: each way of making them, whatever their sizes."""

from __future__ import annotations

import pytest
import torch
from operands import bf16, fp16, fp32
from tolerance import assert_same

from fastlora.eager import thin


@pytest.mark.parametrize("lies", ["as aᵀ's rows", "as a bᵀ"])
def test_split_factors_multiply_to_16_bits(lies: str) -> None:
    """And lie so that BLAS reads them as the factors themselves."""
    M, R, N = 70, 5, 33
    f, g = torch.randn(M, R), torch.randn(N, R).t() if lies == "as a bᵀ" else torch.randn(R, N)
    halves = thin.split(f, g)
    assert [half.dtype for half in halves] == [bf16, bf16]
    assert halves[1].is_contiguous() == g.is_contiguous() and halves[1].t().is_contiguous() == g.t().is_contiguous()
    error = halves[0].double() @ halves[1].double() - f.double() @ g.double()
    # each factor's rest is below 2⁻⁹ of it, and what is left out is the rests' product and their own rounding
    assert float((error.abs() / (f.double().abs() @ g.double().abs())).max()) < 2.0**-16


@pytest.mark.parametrize("most", [0, 10**9])
def test_a_gradient_of_b_is_the_same_either_way(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "FEW_GRADS", most)
    M, N, R = 50, 37, 6
    dy, h, b = (torch.randint(-8, 9, size).float() for size in ((M, N), (M, 2 * R), (N, R)))
    h = h[:, R:]  # a group's h is the members' side by side
    b.fill_(torch.nan)  # not read
    db = thin.outer(dy, h, b, 0.5)
    assert db.is_contiguous()
    assert_same(db, (0.5 * dy.double().t() @ h.double()).float())  # whole numbers are exact in either order


def test_a_product_is_added_in_place_and_rounded_once() -> None:
    y, f, g = (torch.randint(-40, 41, size).float() for size in ((9, 31), (9, 4), (4, 31)))
    y = y.to(bf16)
    wanted = y.double() + 2.0 * f.double() @ g.double()
    place = y.data_ptr()
    out = thin.add_product_(y, f, g, 2.0)
    assert out.data_ptr() == place
    assert_same(out, wanted.to(bf16))


@pytest.mark.parametrize("dtype", [bf16, fp32, torch.float64])
def test_a_cast_is_torchs(dtype: torch.dtype) -> None:
    t = torch.randn(3, 4)
    assert_same(thin.cast(t, dtype), t.to(dtype))
    assert (thin.cast(t, dtype) is t) == (dtype is fp32)


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_a_product_rounds_no_wider_sum(dtype: torch.dtype) -> None:
    """What holds more than the factors keeps it: all bits of an fp32 y, the range of a bf16 one beside fp16's."""
    f, g = torch.ones(3, 2, dtype=dtype), torch.ones(2, 5, dtype=dtype)
    for y in (torch.full((3, 5), 1 + 2.0**-20), torch.full((3, 5), 2.0**100, dtype=bf16)):
        wanted = y + 4.0
        assert_same(thin.add_product_(y, f, g, 2.0), wanted)
