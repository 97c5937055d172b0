"""fastlora: LoRA that costs what its arithmetic costs.

    model = get_peft_model(model, LoraConfig(...))
    print(fastlora.patch(model))                       # and train as before

Virtual tokens before the input, alone or with LoRA: `fastlora.SoftPrompt`, `fastlora.add_soft_prompt`.
Many adapters in one batch: `fastlora.AdapterBank` serves them, `fastlora.Jobs` trains them.
Without PEFT: `fastlora.LoRALinear`, or `fastlora.functional.lora_linear` on bare tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlora import functional, reference
from fastlora.dispatch import Decision, explain
from fastlora.modules import LoRALinear
from fastlora.multi import MultiLoRALinear
from fastlora.prepend import add_soft_prompt, load_soft_prompt, remove_soft_prompts, set_soft_prompt
from fastlora.soft import SoftPrompt
from fastlora.warm import warmup

if TYPE_CHECKING:
    from fastlora.bank import AdapterBank
    from fastlora.jobs import Jobs
    from fastlora.peft import PatchReport, patch, register, unpatch

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "Decision",
    "Jobs",
    "LoRALinear",
    "MultiLoRALinear",
    "PatchReport",
    "SoftPrompt",
    "add_soft_prompt",
    "explain",
    "functional",
    "load_soft_prompt",
    "patch",
    "reference",
    "register",
    "remove_soft_prompts",
    "set_soft_prompt",
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
    if name == "Jobs":
        from fastlora.jobs import Jobs

        return Jobs
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
