"""Dropout regenerated from a seed, never stored: the same bits in every kernel, whatever its tile.

`fastlora.reference.dropout_mask` defines them: Philox-4x32-10 (Salmon et al. 2011), counter (row, col//8, 0, 0).
"""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(p: float) -> int:
    """The 16-bit lane value below which an element is dropped, round(65536·p)."""
    return min(round(65536 * p), 65535)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, 65536 / (65536 − threshold)."""
    return 65536 / (65536 - threshold(p))


@triton.jit
def keep(seed, offs_m, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """keep[BLOCK_M, BLOCK_N] for rows offs_m and the BLOCK_N columns from col_start, a multiple of 8.

    One Philox call serves eight columns: four words, low half before high half.
    """
    groups = col_start // 8 + tl.arange(0, BLOCK_N // 8)
    rows = offs_m.to(tl.uint32)[:, None] + tl.zeros([1, BLOCK_N // 8], tl.uint32)
    cols = groups.to(tl.uint32)[None, :] + tl.zeros([BLOCK_M, 1], tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, rows, cols, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # minor axes: high, then low bit of the word's number
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_M, BLOCK_N])
    return lanes >= threshold


@triton.jit
def keep_by_halves(seed, offs_m, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`keep`, one half of the columns after the other: fewer words are held at once."""
    left = keep(seed, offs_m, col_start, threshold, BLOCK_M, BLOCK_N // 2)
    right = keep(seed, offs_m, col_start + BLOCK_N // 2, threshold, BLOCK_M, BLOCK_N // 2)
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [BLOCK_M, BLOCK_N])
