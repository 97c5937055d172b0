"""Triton's interpreter, four times as fast, with a tensor core's arithmetic in place of numpy's, and masks of bools."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


def truncate() -> None:
    """Products as an H200 sums them: sixteen terms at a time, exactly, and then towards zero to fp32.

    numpy rounds to nearest, and so hides what a long sum in a running accumulator loses. (Known by its errors: a shrink
    of rank 1 errs by 6.669e-8 here, and erred by 6.67e-8 there; numpy makes it 3.1e-8.)
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        wide_a, wide_b, total = (t.data.astype(np.float64) for t in (a, b, acc))
        with np.errstate(invalid="ignore", over="ignore"):
            for k in range(0, wide_a.shape[-1], 16):
                total = _towards_zero(total + wide_a[..., k : k + 16] @ wide_b[..., k : k + 16, :])
        return TensorHandle(total.astype(np.float32), acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def want_bools() -> None:
    """Masks of bools alone, as Triton 3.9 has it: of a scalar of int1, spread over a block, interpreters make int32."""
    from triton.runtime.interpreter import InterpreterBuilder

    def checked(access: Callable[..., Any], at: int) -> Callable[..., Any]:
        def masked(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[at] if isinstance(args[at], np.ndarray) else args[at].data
            if mask.dtype != bool:
                raise ValueError(f"mask: got {mask.dtype}, wanted bool")
            return access(self, *args, **kwargs)

        return masked

    InterpreterBuilder.create_masked_load = checked(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = checked(InterpreterBuilder.create_masked_store, 2)


def _towards_zero(exact: Any) -> Any:
    """float64 → the fp32 next to it on zero's side, still held in float64."""
    near = exact.astype(np.float32)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near).astype(np.float64)


def quicken() -> None:
    """Changes no number: each of these would have come to the same."""
    import triton.language as tl  # TRITON_INTERPRET is read at the first import
    from triton.language import core
    from triton.language.core import is_builtin, pointer_type
    from triton.language.semantic import TritonSemantic
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
        known = tl, core
        return [value for value in function.__globals__.values() if inspect.ismodule(value) and value in known]

    def patch_lang_once(function: Any) -> Any:
        """Replaces the language at each call of a jitted function by what the kernel's launch has replaced it by."""
        if any(is_builtin(language.load) for language in languages_of(function)):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    block_type, tensor, constexpr = core.block_type, core.tensor, core.constexpr
    make_block, blocks = block_type.__init__, {}
    scalar_shape = core.tuple([]), constexpr(1)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        """Unwraps, checks and writes out a shape for each block; there are few shapes."""
        sizes = tuple(size.value if isinstance(size, constexpr) else size for size in shape)
        if sizes not in blocks:
            make_block(self, element_ty, shape)
            of_tensors = core.tuple([constexpr(size) for size in sizes]), constexpr(self.numel)
            blocks[sizes] = self.shape, self.numel, str(self.shape), of_tensors
        self.element_ty = element_ty
        self.shape, self.numel, written, self.of_tensors = blocks[sizes]
        self.name = f"<{written}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        """Wraps each size of a tensor anew."""
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar_shape

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> Any:
        """Compares size by size what has one shape."""
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    block_type.__init__, tensor.__init__ = init_block, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_unlike
    interpreter._patch_lang = patch_lang_once
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = get_np_dtype
    # an overflow is looked for at each sum of integers, a third of the time, and asserted in debug alone
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
