"""Triton's interpreter, quicker: at each call of a jitted function it looks through its whole language for builtins."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def remember_builtins() -> None:
    """Search each package once. A call within a call finds them replaced already, and replaces none, as before."""
    from triton.language.core import is_builtin  # TRITON_INTERPRET is read at the first import
    from triton.runtime import interpreter

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, *builder_and_scope: Any) -> None:
        for name in builtins_of(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *builder_and_scope)

    interpreter._patch_builtin = patch_builtin
