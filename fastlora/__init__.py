"""fastlora: LoRA that costs what its arithmetic costs.

    model = get_peft_model(model, LoraConfig(...))
    print(fastlora.patch(model))                       # and train as before

Without PEFT: `fastlora.LoRALinear`, or `fastlora.functional.lora_linear` on bare tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora import functional, reference
from fastlora.dispatch import Decision, explain
from fastlora.modules import LoRALinear
from fastlora.warm import warmup

if TYPE_CHECKING:
    from fastlora.peft import PatchReport, patch, register, unpatch

__version__ = "0.1.0"

__all__ = [
    "Decision",
    "LoRALinear",
    "PatchReport",
    "explain",
    "functional",
    "patch",
    "reference",
    "register",
    "unpatch",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """What speaks to PEFT imports peft and transformers; only its callers pay for that."""
    if name in ("patch", "unpatch", "register", "PatchReport"):
        from fastlora import peft

        return getattr(peft, name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
