"""Triton kernels of LoRA and their launchers: tensors in, tensors out. Knows no nn.Module, no autograd, no PEFT."""

from fastlora_kernels import overlap
from fastlora_kernels.device import INTERPRET, arch
from fastlora_kernels.dy_pass import dy_pass, group_dy_pass
from fastlora_kernels.expand import (
    add_expand,
    dx,
    expand,
    group_dx,
    group_low_rank_dx,
    low_rank,
    low_rank_dx,
)
from fastlora_kernels.gated import gated_backward, gated_linear
from fastlora_kernels.glu import glu, glu_backward
from fastlora_kernels.group import group_backward, group_linear
from fastlora_kernels.jobs import jobs_backward, jobs_linear, jobs_update
from fastlora_kernels.linear import lora_backward, lora_linear, lora_update
from fastlora_kernels.multi import multi_expand, multi_shrink
from fastlora_kernels.multi_linear import multi_linear
from fastlora_kernels.multi_outer import multi_outer
from fastlora_kernels.routing import Drops, Routes, route
from fastlora_kernels.shrink import group_shrink, shrink
from fastlora_kernels.tables import Tile, strategy, table, tile
from fastlora_kernels.x_pass import group_x_pass, x_pass

__all__ = [
    "INTERPRET",
    "Drops",
    "Routes",
    "Tile",
    "add_expand",
    "arch",
    "dx",
    "dy_pass",
    "expand",
    "gated_backward",
    "gated_linear",
    "glu",
    "glu_backward",
    "group_backward",
    "group_dx",
    "group_dy_pass",
    "group_linear",
    "group_low_rank_dx",
    "group_shrink",
    "group_x_pass",
    "jobs_backward",
    "jobs_linear",
    "jobs_update",
    "lora_backward",
    "lora_linear",
    "lora_update",
    "low_rank",
    "low_rank_dx",
    "multi_expand",
    "multi_linear",
    "multi_outer",
    "multi_shrink",
    "overlap",
    "route",
    "shrink",
    "strategy",
    "table",
    "tile",
    "x_pass",
]
