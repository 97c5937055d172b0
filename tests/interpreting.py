"""Triton's interpreter, twice as fast: what it does again and again, or computes and throws away, it does no more."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any


def quicken() -> None:
    """Changes no number: each of these would have come to the same."""
    import triton.language
    from triton.language.core import is_builtin, pointer_type  # TRITON_INTERPRET is read at the first import
    from triton.runtime import interpreter

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, *builder_and_scope: Any) -> None:
        """Looks for a package's builtins at each call of a jitted function; inside another's, all are replaced."""
        names = builtins_of(package)
        if is_builtin(getattr(package, names[0])):
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), *builder_and_scope)

    numpy_dtype, scalar_dtype = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def get_np_dtype(dtype: Any) -> Any:
        """Makes a table of 18 dtypes at each look into it."""
        scalar = dtype.scalar
        return numpy_dtype(scalar) if isinstance(scalar, pointer_type) else scalar_dtype(scalar)

    patch_lang = interpreter._patch_lang

    @cache
    def languages_of(function: Any) -> list[Any]:
        known = triton.language, triton.language.core
        return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in known]

    def patch_lang_once(function: Any) -> Any:
        """Replaces the language at each call of a jitted function by what the kernel's launch has replaced it by."""
        if any(is_builtin(language.load) for language in languages_of(function)):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang_once
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = get_np_dtype
    # an overflow is looked for at each sum of integers, a third of the time, and asserted in debug alone
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
