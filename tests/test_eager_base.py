"""The frozen layer's products on a CPU with and without a matmul of 16 bits: exact, and never by the slow one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import eager
from fastlora.eager import base

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear"}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["matmul", "no matmul"])
def has_matmul(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Of 16 bits, whatever this machine has."""
    has: bool = request.param
    monkeypatch.setattr(base, "has_matmul", lambda dtype: has or dtype.itemsize > 2)
    return has


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("M", [0, 1, base.WIDE_ROWS - 1, base.WIDE_ROWS, 40])
def test_products_are_exact(M: int, dtype: torch.dtype, has_matmul: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, over several bands of w, the last one shorter."""
    K, sizes = 24, (50, 33)
    monkeypatch.setattr(base, "BAND", 17 * K)
    x, bias, *ws = (torch.randn(shape).to(dtype) for shape in ((M, K), (50,), *((N, K) for N in sizes)))
    for shift in (None, bias, bias.float()):
        plain = linear(x, ws[0], None if shift is None else bias)
        exact = linear(x.double(), ws[0].double(), None if shift is None else bias.double())
        assert base.project(x, ws[0], shift).dtype == dtype
        assert_close(base.project(x, ws[0], shift), plain, exact)
    assert base.project(x.view(1, M, K), ws[0], bias).shape == (1, M, 50)
    dys = [torch.randn(M, N).to(dtype) for N in sizes]
    plain, exact = torch.zeros(M, K, dtype=dtype), torch.zeros(M, K, dtype=torch.float64)
    for count, (dy, w) in enumerate(zip(dys, ws, strict=True), 1):
        plain, exact = plain + dy.mm(w), exact + dy.double().mm(w.double())
        dx = base.pull_back(*zip(dys[:count], ws[:count], strict=True))
        assert dx.dtype == dtype
        assert_close(dx, plain, exact)


class _Products(TorchDispatchMode):
    """The dtypes of everything multiplied inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {t.dtype for t in args if isinstance(t, Tensor) and t.dim() > 1}
        return func(*args, **(kwargs or {}))


def one_layer(t: Callable[..., Tensor], M: int, N: int) -> None:
    x, w, a, b = t(M, 256), t(N, 256), t(16, 256), t(N, 16)
    for seed, p in ((None, 0.0), (torch.tensor(3), 0.1)):
        y, h = eager.lora_linear(x, w, None, a, b, None, seed, 0.5, p)
        eager.lora_backward(y, x, w, a, b, h, seed, 0.5, p, True, True, True)


def a_group(t: Callable[..., Tensor], M: int, N: int) -> None:
    x, ws, as_, bs = t(M, 256), [t(N, 256)] * 2, [t(16, 256)] * 2, [t(N, 16)] * 2
    for seeds, ps in ((None, [0.0, 0.0]), (torch.tensor([3, 5]), [0.1, 0.1])):
        ys, h = eager.lora_group(x, ws, [None] * 2, as_, bs, [None] * 2, seeds, [0.5] * 2, ps)
        wants = [True, True]
        eager.lora_group_backward(ys, x, ws, as_, bs, h, seeds, [0.5] * 2, ps, True, wants, wants)


def a_gated_mlp(t: Callable[..., Tensor], M: int, N: int) -> None:
    x, ws = t(M, 256), [t(N, 256), t(N, 256), t(256, N)]
    for as_, bs in (
        ([t(16, 256), t(16, 256), t(16, N)], [t(N, 16), t(N, 16), t(256, 16)]),
        ([t(16, 256), None, None], [t(N, 16), None, None]),
    ):
        none: list[Any] = [None] * 3
        y, g, u, h, h_down = eager.lora_gated(x, ws, none, as_, bs, none, None, [0.5] * 3, [0.0] * 3, "silu")
        wants = [a is not None for a in as_]
        eager.lora_gated_backward(
            y, x, g, u, ws, as_, bs, h, h_down, None, [0.5] * 3, [0.0] * 3, "silu", True, wants, wants, False, False
        )


def two_jobs(t: Callable[..., Tensor], M: int, N: int) -> None:
    x, w, as_, bs = t(M, 256), t(N, 256), [t(16, 256)] * 2, [t(N, 16)] * 2
    for jobs in ((0, 1), (0, 1) * (M // 2)):
        y, h = eager.jobs_linear(x, w, None, as_, bs, [None] * 2, None, jobs, [0.5] * 2, [0.0] * 2)
        wants = True, True, True
        eager.jobs_backward(y, x, w, as_, bs, [False] * 2, h, None, jobs, [0.5] * 2, [0.0] * 2, *wants)


@pytest.mark.parametrize("run", [one_layer, a_group, a_gated_mlp, two_jobs], ids=lambda run: run.__name__)
@pytest.mark.parametrize(("M", "N"), [(32, 64), (512, 520)])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_that_the_cpu_lacks_is_not_asked_for(
    run: Callable[..., None], M: int, N: int, dtype: torch.dtype, has_matmul: bool
) -> None:
    """Rows few (which take a way of their own) and many; adapters of the base's dtype, or fp32 on it."""
    for adapter in (dtype, torch.float32):
        with _Products() as products, torch.no_grad():
            run(lambda *shape: torch.randn(shape).to(dtype if 16 not in shape else adapter), M, N)  # noqa: B023
        assert torch.float32 in products.dtypes or adapter == dtype
        assert (dtype in products.dtypes) is has_matmul, products.dtypes


def test_many_adapters_too(has_matmul: bool) -> None:
    x, y = torch.randn(4, 3, 16).bfloat16(), torch.randn(4, 3, 20).bfloat16()
    a, b = torch.randn(4, 2, 16).bfloat16(), torch.randn(4, 2, 20)
    with _Products() as products:
        eager.multi_update_([y], x, 4, None, a, [b], [None])
    assert products.dtypes == ({torch.bfloat16, torch.float32} if has_matmul else {torch.float32})
