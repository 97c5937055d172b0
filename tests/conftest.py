"""Every run interprets the real Triton kernels on CPU tensors, or runs them on the GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are first imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
