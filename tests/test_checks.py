"""Bad input is refused by name, with what came and what was wanted, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.functional import lora_linear, lora_update


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
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: got 1.0, wanted a probability in \[0, 1\)"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p: got -0.1"),
    ({"dropout_p": True}, TypeError, "dropout_p: got bool"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_bad_layer(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_linear(**{**layer(), **change})


def test_bad_update() -> None:
    given = layer()
    x, a, b = given["x"], given["lora_A"], given["lora_B"]
    with pytest.raises(ValueError, match=r"y: got shape \(3, 6\), wanted \(2, 3, 6\)"):
        lora_update(torch.randn(3, 6), x, a, b, 0.5)
    with pytest.raises(ValueError, match=r"lora_B: got shape \(6, 4\), wanted \(7, 4\)"):
        lora_update(torch.randn(2, 3, 7), x, a, b, 0.5)


def test_triton_is_refused_with_the_reason_where_it_cannot_run() -> None:
    given = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in layer().items()}
    with pytest.raises(RuntimeError, match=r"'triton' was asked for, and the kernels take bf16, fp16 and fp32"):
        lora_linear(**given, backend="triton")
