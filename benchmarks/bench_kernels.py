"""For pytest-benchmark: `pytest --benchmark-only benchmarks/` times the layer and each launcher on one small shape.

On a GPU the launchers are the Triton kernels; on a CPU, where those only run interpreted, their twins in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora_kernels
from benchmarks.clock import synchronize
from benchmarks.gate import Operands
from benchmarks.layers import FLOOR, IMPLS
from fastlora import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, K, N, R, SCALE = (4096, 4096, 4096, 16, 2.0) if DEVICE.type == "cuda" else (64, 256, 384, 16, 2.0)
DTYPES = {"bf16": (torch.bfloat16, torch.bfloat16), "bf16+fp32": (torch.bfloat16, torch.float32)}


@pytest.fixture(params=DTYPES)
def dtypes(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    return DTYPES[request.param]


def timed(benchmark: Any, run: Callable[[], object]) -> None:
    def waited() -> None:
        run()
        synchronize(DEVICE)

    benchmark(waited)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("impl", [name for name in IMPLS if not name.endswith("-compiled")])
def test_layer(benchmark: Any, impl: str, p: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Forward and backward."""
    operands = Operands.random(M, K, N, R, *dtypes, p, DEVICE)
    call = operands.built(IMPLS[impl])
    if call is None:
        pytest.skip("it does not apply")
    leaves = operands.leaves[:1] if impl == FLOOR else operands.leaves
    timed(benchmark, lambda: torch.autograd.grad(call(), leaves, operands.dy))


def launches(t: Operands) -> dict[str, Callable[[], object]]:
    """Each launcher by name, or its twin."""
    ops: Any = fastlora_kernels if DEVICE.type == "cuda" else reference
    x, w, a, b, dy = (u.detach() for u in (t.x, t.w, t.a, t.b, t.dy))
    h: Tensor = torch.randn(M, R, device=DEVICE)
    return {
        "shrink": lambda: ops.shrink(x, a),
        "expand": lambda: ops.expand(x, w, None, h, b, SCALE),
        "add": lambda: ops.add_expand(dy, h, b, SCALE),
        "dy": lambda: ops.dy_pass(dy, h, b, SCALE),
        "x": lambda: ops.x_pass(x, h, a.dtype),
        "dx": lambda: ops.dx(dy, w, h, a),
    }


@pytest.mark.parametrize("name", ["shrink", "expand", "add", "dy", "x", "dx"])
def test_launcher(benchmark: Any, name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    timed(benchmark, launches(Operands.random(M, K, N, R, *dtypes, 0.0, DEVICE))[name])
