"""Who launches what: the kernels that reach the GPU, or the interpreter, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

HOMES = ("shrink", "dy_pass", "x_pass", "expand", "persistent", "reduce", "glu", "multi")
"""The modules of fastlora_kernels that launch a layer's kernels."""


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[str], None], *homes: str) -> None:
    """Call `see` with the name of each kernel that these modules launch, all of them unless named."""
    for home in homes or HOMES:
        module = import_module(f"fastlora_kernels.{home}")

        def launch(kernel: Any, *args: Any, _own: Callable[..., None] = module.launch, **kwargs: Any) -> None:
            see(kernel.fn.__name__.strip("_").removesuffix("_kernel"))
            _own(kernel, *args, **kwargs)

        monkeypatch.setattr(module, "launch", launch)
