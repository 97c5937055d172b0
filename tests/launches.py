"""Who launches what: the kernels that reach the GPU, or the interpreter, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from fastlora_kernels.launch import Launch


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[str], None]) -> None:
    """Call `see` with the name of each kernel that is launched."""
    own = Launch.__call__

    def call(launch: Launch, *given: Any) -> None:
        see(launch.kernel.fn.__name__.strip("_").removesuffix("_kernel"))
        own(launch, *given)

    monkeypatch.setattr(Launch, "__call__", call)


def plan_by(monkeypatch: pytest.MonkeyPatch, *homes: str, **names: Any) -> None:
    """Replace names in these modules of fastlora_kernels, and forget, for as long, what they planned without."""
    for home in homes:
        module: Any = import_module(f"fastlora_kernels.{home}")
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)
