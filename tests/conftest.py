"""Every run interprets the real Triton kernels on CPU tensors, or runs them on the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are first imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

hypothesis.settings.register_profile("fastlora", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastlora")

GUARD = 4096
"""Elements on either side of a poisoned tensor that nobody may write."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test puts its tensors: interpreted on the CPU, and the same test compiled on the GPU."""
    from fastlora_kernels import INTERPRET

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (request.param == "cpu") != INTERPRET:
        pytest.skip(f"the kernels are {'interpreted' if INTERPRET else 'compiled'} in this run (TRITON_INTERPRET)")
    return request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a launcher allocates starts as NaN, between two guards that must still be NaN when the test ends."""
    plain = torch.Tensor.new_empty
    grounds: list[Tensor] = []

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        shaped = plain(self, *args, **kwargs)  # type: ignore[arg-type]
        if not shaped.is_floating_point():
            return shaped
        ground = plain(shaped, shaped.numel() + 2 * GUARD).fill_(float("nan"))
        grounds.append(ground)
        return ground[GUARD : GUARD + shaped.numel()].view(shaped.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    yield
    for ground in grounds:
        assert ground[:GUARD].isnan().all() and ground[-GUARD:].isnan().all(), "written outside the output"
