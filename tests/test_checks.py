"""Bad input is refused by name, with what came and what was wanted, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_same

from fastlora.functional import Projection, jobs_linear, lora_gated_mlp, lora_linear, lora_linear_group, lora_update

FP8 = torch.float8_e4m3fn


def layer() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 3, 8),
        "weight": torch.randn(6, 8),
        "bias": torch.randn(6),
        "lora_A": torch.randn(4, 8),
        "lora_B": torch.randn(6, 4),
        "scaling": 0.5,
    }


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(2, 9)}, ValueError, r"x: got shape \(2, 9\), wanted \[..., 8\]"),
    ({"x": torch.randn(())}, ValueError, "x: got a 0-d tensor"),
    ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64, wanted a floating dtype"),
    ({"x": [1.0]}, TypeError, "x: got list, wanted a torch.Tensor"),
    ({"x": torch.randn(2, 8).double()}, TypeError, "x: got dtype torch.float64, wanted weight's torch.float32"),
    ({"x": None}, TypeError, "x: got NoneType, wanted a torch.Tensor"),
    ({"x": torch.ones(2, 8).bool()}, TypeError, "x: got dtype torch.bool, wanted a floating dtype"),
    ({"x": torch.randn(2, 8).to(FP8), "weight": torch.randn(6, 8).to(FP8)}, TypeError, "x: got dtype torch.float8"),
    ({"weight": None}, TypeError, "weight: got NoneType, wanted a torch.Tensor"),
    ({"lora_A": None}, TypeError, "lora_A: got NoneType, wanted a torch.Tensor"),
    ({"lora_B": None, "bias": None}, TypeError, "lora_B: got NoneType, wanted a torch.Tensor"),
    ({"lora_A": torch.randn(4, 8).to(FP8)}, TypeError, "lora_A: got dtype torch.float8"),
    ({"lora_B": torch.randn(6, 4).cfloat()}, TypeError, "lora_B: got dtype torch.complex64"),
    ({"weight": torch.randn(6, 8, 1)}, ValueError, r"weight: got shape \(6, 8, 1\), wanted \[N, K\]"),
    ({"weight": torch.randn(6, 8, device="meta")}, ValueError, "weight: got device meta, wanted cpu, where x is"),
    ({"bias": torch.randn(5)}, ValueError, r"bias: got shape \(5,\), wanted \(6,\)"),
    ({"lora_A": torch.randn(8)}, ValueError, r"lora_A: got shape \(8,\), wanted two dimensions"),
    ({"lora_A": torch.randn(0, 8), "lora_B": torch.randn(6, 0)}, ValueError, "lora_A: got rank 0"),
    ({"lora_A": torch.randn(4, 7)}, ValueError, r"lora_A: got shape \(4, 7\), wanted \(4, 8\)"),
    ({"lora_B": torch.randn(4, 6)}, ValueError, r"lora_B: got shape \(4, 6\), wanted \(6, 4\)"),
    ({"lora_bias": torch.randn(4)}, ValueError, r"lora_bias: got shape \(4,\), wanted \(6,\)"),
    ({"scaling": float("nan")}, ValueError, "scaling: got nan, wanted a finite number"),
    ({"scaling": "2"}, TypeError, "scaling: got str, wanted a number"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling: got a tensor of shape \(2,\)"),
    ({"scaling": torch.ones(1, 1, 1)}, ValueError, r"scaling: got a tensor of shape \(1, 1, 1\), wanted a number"),
    ({"scaling": torch.ones((), device="meta")}, ValueError, "scaling: got device meta, wanted cpu, where x is"),
    ({"scaling": torch.tensor(1j)}, TypeError, "scaling: got a tensor of dtype torch.complex64, wanted a real number"),
    ({"scaling": torch.tensor(True)}, TypeError, "scaling: got a tensor of dtype torch.bool, wanted a real number"),
    ({"scaling": 10**400}, ValueError, "scaling: got a whole number that no float holds, wanted a finite number"),
    ({"scaling": np.float32("inf")}, ValueError, "scaling: got inf, wanted a finite number"),
    ({"scaling": True}, TypeError, "scaling: got bool, wanted a number"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan, wanted a probability"),
    ({"dropout_p": "0.1"}, TypeError, r"dropout_p: got str, wanted a number in \[0, 1\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: got 1.0, wanted a probability in \[0, 1\)"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: got -0.1"),
    ({"dropout_p": True}, TypeError, "dropout_p: got bool"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_bad_layer(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_linear(**{**layer(), **change})


@pytest.mark.parametrize("scaling", [np.int64(2), np.float32(2), 2, torch.tensor(2.0), torch.tensor([2.0])], ids=repr)
def test_any_real_number_scales(scaling: Any) -> None:
    given = {**layer(), "dropout_p": np.float32(0)}
    assert_same(lora_linear(**{**given, "scaling": scaling}), lora_linear(**{**given, "scaling": 2.0}))


def test_bad_members_are_named_with_their_place() -> None:
    x, w, a, b = torch.randn(2, 8), torch.randn(6, 8), torch.randn(4, 8), torch.randn(6, 4)
    with pytest.raises(TypeError, match="member 1: weight: got NoneType, wanted"):
        lora_linear_group(x, [w, None], [None] * 2, [a, None], [b, None], [1.0] * 2)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="member 0: x: got NoneType"):
        lora_linear_group(None, [w, w], [None] * 2, [None, a], [None, b], [1.0] * 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="member 0: x: got a 0-d tensor"):
        lora_linear_group(x[0, 0], [w, w], [None] * 2, [None, a], [None, b], [1.0] * 2)
    with pytest.raises(TypeError, match="biases: got NoneType, wanted a list, an entry for each of weights"):
        lora_linear_group(x, [w, w], None, [a, a], [b, b], [1.0] * 2)  # type: ignore[arg-type]
    for name in ("weights", "dropout_p", "lora_biases"):
        given = {"weights": [w, w], "biases": [None] * 2, "lora_As": [a, a], "lora_Bs": [b, b], "scalings": [1.0] * 2}
        with pytest.raises(TypeError, match=f"{name}: got object, wanted a list"):
            lora_linear_group(x, **{**given, name: object()})
    with pytest.raises(ValueError, match=r"member 0: bias: got shape"):
        lora_linear_group(x, torch.stack((w, w)), [a, a], [a, a], [b, b], [1.0] * 2)  # type: ignore[arg-type]
    plain = Projection(w)
    with pytest.raises(TypeError, match="gate: weight: got NoneType"):
        lora_gated_mlp(x, Projection(None), plain, Projection(w.t()), "silu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation: got \['silu'\], wanted one of"):
        lora_gated_mlp(x, plain, plain, Projection(w.t()), ["silu"])  # type: ignore[arg-type]


def test_bad_update() -> None:
    given = layer()
    x, a, b = given["x"], given["lora_A"], given["lora_B"]
    with pytest.raises(ValueError, match=r"y: got shape \(3, 6\), wanted \(2, 3, 6\)"):
        lora_update(torch.randn(3, 6), x, a, b, 0.5)
    with pytest.raises(ValueError, match=r"lora_B: got shape \(6, 4\), wanted \(7, 4\)"):
        lora_update(torch.randn(2, 3, 7), x, a, b, 0.5)
    with pytest.raises(TypeError, match="y: got NoneType, wanted"):
        lora_update(None, x, a, b, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling: got device meta, wanted cpu"):
        lora_update(torch.randn(2, 3, 6), x, a, b, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match=r"source: got shape \(2, 8\), wanted \(2, 3, 8\): x's"):
        lora_update(torch.randn(2, 3, 6), x, a, b, 0.5, source=x[:, 0])
    for dtype in ("fp16", torch.int32):
        with pytest.raises(TypeError, match=r"dtype: got dtype .*, wanted a floating dtype"):
            lora_update(torch.randn(2, 3, 6), x, a, b, 0.5, dtype=dtype)  # type: ignore[arg-type]


JOBS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lora_As": None}, TypeError, r"lora_As: got NoneType, wanted a list, one \[R, K\] for each job"),
    ({"lora_As": []}, ValueError, "lora_As: got an empty list"),
    ({"jobs": None}, TypeError, "jobs: got NoneType, wanted a list, a job's number for each request"),
    ({"jobs": torch.tensor([0, 1])}, TypeError, "jobs: got a Tensor among its entries, wanted whole numbers"),
    ({"jobs": [0, 0.5]}, TypeError, "jobs: got a float among its entries, wanted whole numbers"),
    ({"jobs": ["a", "b"]}, TypeError, "jobs: got a str among its entries, wanted whole numbers"),
    ({"jobs": [0, 2]}, ValueError, r"jobs: got \[0, 2\], wanted numbers from −1"),
    ({"jobs": [0] * 4}, ValueError, "jobs: got 4 entries, wanted a number that divides the 6 rows of x"),
    ({"salts": [1, 2]}, TypeError, "salts: got list, wanted a tensor of torch.int64"),
    ({"salts": torch.ones(2)}, TypeError, "salts: got torch.float32, wanted a tensor of torch.int64"),
    ({"salts": torch.arange(3)}, ValueError, r"salts: got shape \(3,\), wanted \(2,\)"),
    ({"salts": torch.arange(2, device="meta")}, ValueError, "salts: got device meta, wanted cpu, where x is"),
    ({"dropout_p": None}, TypeError, "dropout_p: got NoneType, wanted a list, an entry for each of lora_As"),
]


@pytest.mark.parametrize(("change", "error", "message"), JOBS)
def test_bad_jobs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = layer()
    each = {"lora_As": [given["lora_A"]] * 2, "lora_Bs": [given["lora_B"]] * 2, "scalings": [0.5] * 2, "jobs": [0, 1]}
    with pytest.raises(error, match=message):
        jobs_linear(given["x"], given["weight"], given["bias"], **{**each, "dropout_p": 0.1, **change})


def test_numpys_probability_is_one_for_all() -> None:
    given = layer()
    x, w, a, b = given["x"], given["weight"], given["lora_A"], given["lora_B"]
    torch.manual_seed(0)
    one = lora_linear_group(x, [w] * 2, [None] * 2, [a] * 2, [b] * 2, [1.0] * 2, dropout_p=np.float32(0.5))
    ours = jobs_linear(x, w, None, [a], [b], [1.0], [0], dropout_p=np.float32(0.5))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for y, z in zip(one, lora_linear_group(x, [w] * 2, [None] * 2, [a] * 2, [b] * 2, [1.0] * 2, dropout_p=0.5),
                    strict=True):  # fmt: skip
        assert_same(y, z)
    assert_same(ours, jobs_linear(x, w, None, [a], [b], [1.0], [0], dropout_p=0.5))


def test_triton_is_refused_with_the_reason_where_it_cannot_run() -> None:
    given = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in layer().items()}
    with pytest.raises(RuntimeError, match=r"'triton' was asked for, and the kernels take bf16, fp16 and fp32"):
        lora_linear(**given, backend="triton")
