"""Products of 16-bit and fp32 tiles on tensor cores: fp32 factors are split into bf16 pieces.

`tl.dot(bf16, fp32)` does not compile, `ieee` has no tensor cores, and rounding an adapter to bf16 costs four digits of
its gradient. An fp32 value is the sum of three bf16 pieces (8 + 8 + 8 bits of mantissa); products of pieces are exact
in the fp32 accumulator, so n pieces give 8n bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def pieces(main: torch.dtype, factors: tuple[torch.dtype, ...], out: torch.dtype, precision: str) -> int:
    """How many bf16 pieces a product takes; 0 is the native dot of equal 16-bit operands.

    main: dtype of the big operand (x, w or dy).   factors: dtypes of the thin ones.   out: dtype of the result.
    Two for 16-bit results. For fp32 results torch's own setting decides: "highest" three, "high" two, "medium" one.
    precision: that setting, from `place`.
    """
    if main != torch.float32 and all(f == main for f in factors):
        return 0
    if out != torch.float32:
        return 2
    return {"highest": 3, "high": 2, "medium": 1}[precision]


@triton.jit
def round_bf16(v):
    """fp32 → the nearest bf16, ties to even, still held in fp32; Triton's interpreter truncates its own casts."""
    bits = v.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)


@triton.jit
def piece(v, INTERPRET: tl.constexpr):
    """The leading bf16 piece of an fp32 tile."""
    if INTERPRET:
        return round_bf16(v)
    else:
        return v.to(tl.bfloat16)


@triton.jit
def rest(v, lead):
    """v minus its leading piece, exact in fp32; 0 where nothing is left, so that inf − inf never arises."""
    lead = lead.to(tl.float32)
    return tl.where(lead == v, 0.0, v - lead)


@triton.jit
def cast(v, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 tile → dtype, to nearest even also where the interpreter would truncate."""
    if INTERPRET and dtype == tl.bfloat16:
        v = round_bf16(v)
    return v.to(dtype)


@triton.jit
def dot(p, q, acc, PIECES: tl.constexpr, INTERPRET: tl.constexpr, ROUNDED: tl.constexpr = False):
    """acc + p·q in fp32, with p: [I, J] and q: [J, L] as they were loaded; see `pieces` for PIECES.

    Tensor cores truncate whenever they add to an accumulator: over 8192 rows da erred 15 to 35 times more than plain
    fp32 on an H200. ROUNDED, and always with three pieces, they sum each call by itself and acc grows by rounded
    additions. With three pieces the leading product is apart from the small ones too: its 16 bits, in sums of 16, lose
    next to nothing. The product with w has 16-bit results and goes without, for 1.9 times the speed.
    """
    APART: tl.constexpr = ROUNDED or PIECES >= 3
    part = tl.zeros([p.shape[0], q.shape[1]], tl.float32) if APART else acc
    if PIECES == 0:
        if INTERPRET:  # there a bf16 dot is silently wrong; 16-bit products are exact in fp32
            p, q = p.to(tl.float32), q.to(tl.float32)
        part = tl.dot(p, q, part, input_precision="ieee")
    else:
        P_WIDE: tl.constexpr = p.dtype != tl.bfloat16
        Q_WIDE: tl.constexpr = q.dtype != tl.bfloat16
        P_LONG: tl.constexpr = p.dtype == tl.float32  # fp16's 11 bits fit in two pieces
        Q_LONG: tl.constexpr = q.dtype == tl.float32
        if P_WIDE or INTERPRET:
            p = p.to(tl.float32)
        if Q_WIDE or INTERPRET:
            q = q.to(tl.float32)
        p0 = piece(p, INTERPRET) if P_WIDE else p
        q0 = piece(q, INTERPRET) if Q_WIDE else q
        if PIECES >= 2:
            if P_WIDE:
                p_rest = rest(p, p0)
                p1 = piece(p_rest, INTERPRET)
            if Q_WIDE:
                q_rest = rest(q, q0)
                q1 = piece(q_rest, INTERPRET)
        if PIECES >= 3:
            if P_LONG:
                part = tl.dot(piece(rest(p_rest, p1), INTERPRET), q0, part, input_precision="ieee")
            if Q_LONG:
                part = tl.dot(p0, piece(rest(q_rest, q1), INTERPRET), part, input_precision="ieee")
            if P_WIDE and Q_WIDE:
                part = tl.dot(p1, q1, part, input_precision="ieee")
        if PIECES >= 2:
            if P_WIDE:
                part = tl.dot(p1, q0, part, input_precision="ieee")
            if Q_WIDE:
                part = tl.dot(p0, q1, part, input_precision="ieee")
        if PIECES >= 3:
            acc = acc - (-tl.dot(p0, q0, input_precision="ieee"))
        else:
            part = tl.dot(p0, q0, part, input_precision="ieee")
    if APART:
        return acc - (-part)  # acc + part is what Triton folds back into the accumulator
    return part
