"""LoRA on bare tensors: the autograd rules, each written once."""

from fastlora.functional.gated import lora_gated_mlp
from fastlora.functional.group import lora_linear_group, together
from fastlora.functional.jobs import jobs_linear, jobs_update
from fastlora.functional.linear import lora_linear, lora_linear_on_torch, lora_update
from fastlora.functional.rules import draw_seed
from fastlora.reference import Projection

__all__ = [
    "Projection",
    "draw_seed",
    "jobs_linear",
    "jobs_update",
    "lora_gated_mlp",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_on_torch",
    "lora_update",
    "together",
]
