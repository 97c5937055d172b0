"""Fixed-order sum of fp32 partials: what makes every split reduction deterministic without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.device import INTERPRET, Place, place
from fastlora_kernels.dot import cast
from fastlora_kernels.launch import REMEMBERED, Launch, Layout, layouts
from fastlora_kernels.sizes import cdiv


@triton.jit(do_not_specialize=["PARTS"])
def _reduce_kernel(
    part_ptrs,
    out_ptrs,
    PARTS,
    SIZES,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The results side by side on the second axis of the grid, each summed as if it were alone."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(part_ptrs)):
        if tl.program_id(1) == i:
            mask = offs < SIZES[i]
            part_ptr = part_ptrs[i] + offs
            acc = tl.zeros([BLOCK], tl.float32)
            for _ in range(0, PARTS):
                acc += tl.load(part_ptr, mask=mask, other=0.0)
                part_ptr += SIZES[i]
            tl.store(out_ptrs[i] + offs, cast(acc, out_ptrs[i].dtype.element_ty, INTERPRET), mask=mask)


@lru_cache(maxsize=REMEMBERED)
def _plan(at: Place, parts: tuple[Layout, ...], outs: tuple[Layout, ...]) -> Launch:
    sizes, block = tuple(shape.numel() for shape, _, _ in outs), 1024
    return Launch(
        _reduce_kernel, (cdiv(max(sizes), block), len(outs), 1), (parts[0][0][0], sizes),
        {"num_warps": 4}, INTERPRET=INTERPRET, BLOCK=block,
    )  # fmt: skip


def reduce_each(parts: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """out = Σ_i part[i] for each pair in one launch, summed in the order of i in fp32 and rounded once.

    parts: [P, …] fp32 each, contiguous, of one P.   outs: [...] any float dtype, contiguous, written.
    """
    _plan(place(outs[0]), layouts(parts), layouts(outs))((tuple(parts), tuple(outs)))


def reduce(parts: Tensor, out: Tensor) -> Tensor:
    """out = Σ_i parts[i], summed in the order of i in fp32 and rounded once.

    parts: [P, …] fp32, contiguous.   out: [...] any float dtype, contiguous, written and returned.
    """
    reduce_each([parts], [out])
    return out
