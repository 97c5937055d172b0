"""A model's own methods, put aside while we have its layers, and given back as they were."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_LAYERS_OWN = (
    "save_pretrained", "add_adapter", "load_adapter", "set_adapter", "delete_adapter", "add_weighted_adapter",
    "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload",
)  # fmt: skip
"""Methods of transformers' and PEFT's that look for layers which we have: without them they do nothing, or harm."""


class Doors:
    """Which methods of which owners something else stands in for."""

    def __init__(self) -> None:
        self._installed: list[tuple[Any, str, Any, Any]] = []

    def install(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Put around(inner, …) in the place of the method, with its signature."""
        inner = getattr(owner, name)
        wrapped: Any = functools.update_wrapper(functools.partial(around, inner), inner)
        wrapped.__signature__ = inspect.signature(inner)  # without the self that a function's own may have kept
        self._installed.append((owner, name, vars(owner).get(name), wrapped))
        setattr(owner, name, wrapped)

    def keep_layers(self, owner: Any, why: str) -> None:
        """Refuse what would look for the owner's layers.   why: who has them, and what is wanted instead."""

        def refuse(inner: Callable[..., Any], *_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{inner.__name__}: got a call while {why}")

        for name in _LAYERS_OWN:
            if hasattr(owner, name):
                self.install(owner, name, refuse)

    def close(self) -> None:
        """Give the methods back."""
        while self._installed:
            owner, name, before, wrapped = self._installed.pop()
            if vars(owner).get(name) is wrapped:
                delattr(owner, name)
                if before is not None:
                    setattr(owner, name, before)
