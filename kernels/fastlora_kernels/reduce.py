"""Fixed-order sum of fp32 partials: what makes every split reduction deterministic without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora_kernels.device import INTERPRET, on_device
from fastlora_kernels.dot import cast


@triton.jit(do_not_specialize=["PARTS"])
def _reduce_kernel(
    part_ptr,
    out_ptr,
    PARTS,
    SIZE,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, PARTS):
        acc += tl.load(part_ptr + offs, mask=mask, other=0.0)
        part_ptr += SIZE
    tl.store(out_ptr + offs, cast(acc, out_ptr.dtype.element_ty, INTERPRET), mask=mask)


def reduce(parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = Σ_i parts[i], summed in the order of i in fp32 and rounded once.

    parts: [P, …] fp32, contiguous.   out: [...] any float dtype, contiguous, written and returned.
    """
    size = out.numel()
    block = 1024
    with on_device(out):
        _reduce_kernel[(triton.cdiv(size, block),)](
            parts, out, parts.shape[0], size, INTERPRET=INTERPRET, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
    return out
