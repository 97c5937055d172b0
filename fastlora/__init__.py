"""fastlora: LoRA that costs what its arithmetic costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora import functional, reference

if TYPE_CHECKING:
    from fastlora.peft import patch, register, unpatch

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """patch, unpatch and register import peft and transformers; only their callers pay for that."""
    if name in ("patch", "unpatch", "register"):
        from fastlora import peft

        return getattr(peft, name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
