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


Compiled = tuple[object, ...]
"""What makes two launches the same compiled kernel: its name, constants, options, dtypes and kinds of numbers."""


def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Compiled]:
    """A set that every launch from here on adds its kernel to, as Triton compiles it."""
    own, seen = Launch.__call__, set[Compiled]()

    def kind(number: Any) -> object:
        """As Triton specialises: on 1, on multiples of 16."""
        if isinstance(number, tuple):
            return tuple(map(kind, number))
        return (number == 1, number % 16 == 0) if isinstance(number, int) else type(number)

    def call(launch: Launch, tensors: Any, *given: Any) -> None:
        dtypes = tuple(tuple(t.dtype for t in each) if isinstance(each, tuple) else each.dtype for each in tensors)
        settings = (*launch.constants.items(), *launch.options.items())
        seen.add((launch.kernel.fn.__name__, settings, dtypes, kind(launch.numbers)))
        own(launch, tensors, *given)

    monkeypatch.setattr(Launch, "__call__", call)
    return seen


def plan_by(monkeypatch: pytest.MonkeyPatch, *homes: str, **names: Any) -> None:
    """Replace names in these modules of fastlora_kernels, and forget, for as long, what they planned without."""
    for home in homes:
        module: Any = import_module(f"fastlora_kernels.{home}")
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(module, "_plan", module._plan.__wrapped__)
