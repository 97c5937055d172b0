"""fastlora: LoRA that costs what its arithmetic costs.

    model = get_peft_model(model, LoraConfig(...))
    print(fastlora.patch(model))                       # and train as before

Many adapters in one batch: `fastlora.AdapterBank`.
Without PEFT: `fastlora.LoRALinear`, or `fastlora.functional.lora_linear` on bare tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora import functional, reference
from fastlora.dispatch import Decision, explain
from fastlora.modules import LoRALinear
from fastlora.multi import MultiLoRALinear
from fastlora.warm import warmup

if TYPE_CHECKING:
    from fastlora.bank import AdapterBank
    from fastlora.peft import PatchReport, patch, register, unpatch

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "Decision",
    "LoRALinear",
    "MultiLoRALinear",
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
    if name == "AdapterBank":
        from fastlora.bank import AdapterBank

        return AdapterBank
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
