"""Dropout regenerated from a seed, never kept for backward: the same bits in every kernel, whatever its tile.

`fastlora.reference.dropout_mask` defines them: Philox-4x32-10 (Salmon et al. 2011), counter (row, col//8, 0, 0).
Within one backward the x pass may leave the masks it draws for dx, a bit an element: drawing takes 8 to 9 instructions
an element on sm_90, leaving a bit 3 and reading it 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.sizes import cdiv


def threshold(p: float) -> int:
    """The 16-bit lane value below which an element is dropped, round(65536·p)."""
    return min(round(65536 * p), 65535)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, 65536 / (65536 − threshold)."""
    return 65536 / (65536 - threshold(p))


def empty_bits(masks: int, x: Tensor) -> Tensor:
    """A place for masks of x: [M, K], one bit an element: [masks, M, ⌈K/128⌉·16] uint8; bit c of a row's byte g is
    column 8g + c. Rows are 16 bytes or a multiple, so that loads are wide."""
    M, K = x.shape
    return x.new_empty((masks, M, cdiv(K, 128) * 16), dtype=torch.uint8)


def bits_for(x: Tensor, read: Sequence[bool], drawn: Sequence[bool]) -> Tensor | None:
    """Where the x pass leaves its masks for dx; None where dx has to draw one of its own, or has none.

    read: whether dx masks a member's term.   drawn: whether the x pass draws the mask of that member.
    """
    if not any(read) or not all(there for there, wanted in zip(drawn, read, strict=True) if wanted):
        return None
    return empty_bits(len(read), x)


@triton.jit
def _product(factor: tl.constexpr, word):
    """The high and the low word of factor·word, from one multiplication: `tl.umulhi` and `*` are two."""
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _words(seed, offs_m, col_start, BLOCK_N: tl.constexpr):
    """The random words of a tile, [BLOCK_M, BLOCK_N // 8] four times, each of two lanes, the low half first.

    What depends on the row or on the column alone, most of the first three rounds, is no larger than that.
    """
    c0 = offs_m.to(tl.uint32)[:, None]
    c1 = (col_start // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
    c2, c3 = tl.zeros([1, 1], tl.uint32), tl.zeros([1, 1], tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _select(w0, w1, w2, w3, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns of a tile its words keep. A high lane needs no shift: what is below it decides nothing."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # minor axes: high, then low bit of the word's number
    kept = tl.join((words & 0xFFFF) >= threshold, words >= tl.cast(threshold, tl.uint32) << 16)
    return tl.reshape(kept, [BLOCK_M, BLOCK_N])


@triton.jit
def keep(seed, offs_m, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """keep[BLOCK_M, BLOCK_N] for rows offs_m and the BLOCK_N columns from col_start, a multiple of 8."""
    w0, w1, w2, w3 = _words(seed, offs_m, col_start, BLOCK_N)
    return _select(w0, w1, w2, w3, threshold, BLOCK_M, BLOCK_N)


@triton.jit
def _two_bits(word, threshold, low: tl.constexpr):
    """0xFF without the bits of the lanes that the word drops: `low`, and the one above it.

    To set those that are kept takes 2 % fewer instructions and 8 bytes of spills (sm_90, three members, 64×128).
    """
    bits = tl.where((word & 0xFFFF) >= threshold, 0xFF, 0xFF ^ low)
    return bits & tl.where(word >= tl.cast(threshold, tl.uint32) << 16, 0xFF, 0xFF ^ (2 * low))


@triton.jit
def keep_and_leave(
    seed,
    bits_ptr,
    bits_width,
    offs_m,
    mask_m,
    col_start,
    threshold,
    pid,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`keep`, whose bits are stored too: in rows of bits_width bytes, by the program 0."""
    w0, w1, w2, w3 = _words(seed, offs_m, col_start, BLOCK_N)
    bits = _two_bits(w0, threshold, 1) & _two_bits(w1, threshold, 4)
    bits &= _two_bits(w2, threshold, 16) & _two_bits(w3, threshold, 64)
    groups = col_start // 8 + tl.arange(0, BLOCK_N // 8)
    at = offs_m.to(tl.int64)[:, None] * bits_width + groups[None, :]
    leave = tl.full([1, 1], pid, tl.int32) == 0  # of a scalar, Triton 3.9's interpreter makes int32, no mask
    tl.store(bits_ptr + at, bits.to(tl.uint8), mask=mask_m[:, None] & (groups < bits_width)[None, :] & leave)
    return _select(w0, w1, w2, w3, threshold, BLOCK_M, BLOCK_N)


@triton.jit
def kept_before(bits_ptr, bits_width, offs_m, mask_m, col_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mask that `keep_and_leave` left, for any tile; nothing past the last row, and anything past column K."""
    groups = col_start // 8 + tl.arange(0, BLOCK_N // 8)
    at = offs_m.to(tl.int64)[:, None] * bits_width + groups[None, :]
    bits = tl.load(bits_ptr + at, mask=mask_m[:, None] & (groups < bits_width)[None, :], other=0)
    return tl.reshape(bits[:, :, None] & (1 << tl.arange(0, 8)).to(tl.uint8)[None, None, :], [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def keep_in_turn(seed, offs_m, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`keep`, 64 columns after 64: fewer words are held at once, beside an accumulator that fills the registers."""
    if BLOCK_N > 64:
        left = keep_in_turn(seed, offs_m, col_start, threshold, BLOCK_M, BLOCK_N // 2)
        right = keep_in_turn(seed, offs_m, col_start + BLOCK_N // 2, threshold, BLOCK_M, BLOCK_N // 2)
        return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [BLOCK_M, BLOCK_N])
    else:
        return keep(seed, offs_m, col_start, threshold, BLOCK_M, BLOCK_N)
