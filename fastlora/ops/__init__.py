"""torch.ops.fastlora.*: what a layer does forward and backward as opaque ops, on Triton or on torch.

Every op takes `backend`: "torch", or for the kernels "triton" (the table picks the strategy), "fused" or "split"
(forced). Dropout is on when a `seed` is given. Leading dimensions of x are rows.
"""

from fastlora.eager import activate, few
from fastlora.eager.base import as_rows, has_matmul
from fastlora.eager.few import FEW_INPUTS
from fastlora.ops.gated import gated_gradients, lora_gated, lora_gated_backward
from fastlora.ops.group import GROUP, group_gradients, lora_group, lora_group_backward
from fastlora.ops.jobs import jobs_backward, jobs_gradients, jobs_linear, jobs_update
from fastlora.ops.library import kernels, triton_unavailable
from fastlora.ops.linear import gradients, lora_backward, lora_linear, lora_update
from fastlora.ops.multi import expand_behind_, multi_linear, multi_update_, shrink_ahead

__all__ = [
    "FEW_INPUTS",
    "GROUP",
    "activate",
    "as_rows",
    "expand_behind_",
    "few",
    "gated_gradients",
    "gradients",
    "group_gradients",
    "has_matmul",
    "jobs_backward",
    "jobs_gradients",
    "jobs_linear",
    "jobs_update",
    "kernels",
    "lora_backward",
    "lora_gated",
    "lora_gated_backward",
    "lora_group",
    "lora_group_backward",
    "lora_linear",
    "lora_update",
    "multi_linear",
    "multi_update_",
    "shrink_ahead",
    "triton_unavailable",
]
