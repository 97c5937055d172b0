"""The torch backend: every op in plain PyTorch operators, arranged for a CPU.

What it saves over PEFT's formulation: the low-rank term lands in the base output in place (no M×N intermediate),
products with fp32 adapters on a bf16 base run as one bf16 product of split factors, dropout hashes one seed instead of
drawing one number an element, and a CPU without a matmul of 16 bits gets products in fp32.
"""

from fastlora.eager import few
from fastlora.eager.dropout import drop
from fastlora.eager.gated import activate, lora_gated, lora_gated_backward
from fastlora.eager.group import lora_group, lora_group_backward
from fastlora.eager.jobs import jobs_backward, jobs_linear, jobs_update
from fastlora.eager.linear import lora_backward, lora_linear, lora_update
from fastlora.eager.multi import multi_update_

__all__ = [
    "activate",
    "drop",
    "few",
    "jobs_backward",
    "jobs_linear",
    "jobs_update",
    "lora_backward",
    "lora_gated",
    "lora_gated_backward",
    "lora_group",
    "lora_group_backward",
    "lora_linear",
    "lora_update",
    "multi_update_",
]
