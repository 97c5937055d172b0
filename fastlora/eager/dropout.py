"""What dropout takes on a CPU: of one hash an element what is small, in a few passes as wide as its vectors."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from fastlora import reference
from fastlora.eager.base import batched

TABLE = 2**18
"""Elements of one hash: 2 MiB of tables. A mask of [512, 1024] laid on x takes 89 µs, 71 with 2¹⁹ at a time, which need
twice the scratch; 154 where the gaps between dropped elements are drawn (p = 0.1), 2300 by `F.dropout`."""

_select = torch.ops.aten.threshold_backward.default
"""0 where lanes ≤ bound, of inf and NaN too, else x; one pass, with a cast on either side where x has 16 bits."""

TINY = 2**13
"""Elements up to which 16 bits, or 64, are selected by a mask: its two calls take 2.5 µs, where casts take 4.5."""

_NEGATIVE = 0x7F800001
"""How many floats lie from −inf to −0."""

_WORD = 2**64 - 1


def drop(x: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """x in dtype without what the seed's mask drops, not yet divided by 1−p; a tensor of its own.   x: [M, K].

    Element i is dropped where c[i] + t[i]·s mod 2³² is small, of fixed random c and t and a number s that the seed
    gives to each `TABLE` elements: uniform over the seeds, since t[i] is odd, and over them any few elements are
    independent, unless small multiples of their t add up to 0. Whether it is small is asked of its bits read as a
    float, so that one pass selects. Elsewhere than on a CPU the mask is `reference.dropout_mask`'s.
    """
    if seed.is_cpu and _rows(x.shape[1]) >= len(x):  # by the fewest calls
        return kept(x, lanes(seed, len(x), x.shape[1], p), p, dtype)
    return _drop_into(torch.empty_like(x, dtype=dtype), x, seed, p)


def drop_(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x) in x's place."""
    return _drop_into(x, x, seed, p)


def lanes(number: Tensor, M: int, K: int, p: float) -> Tensor:
    """[M, K] fp32, a mask of up to `TABLE` elements (or one row) as `kept` takes it; a CPU's.

    number: [] int64, the seed where that is the whole mask; what is above 32 bits does not count.
    """
    hashed = torch.addcmul(*_tables(M, K), number)
    return hashed.view(torch.float32) if _bound(p)[1] else hashed.float()


def kept(x: Tensor, lanes: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """x in dtype without what is dropped, a tensor of its own."""
    if dtype is lanes.dtype and x.dtype.itemsize <= dtype.itemsize:
        return _select(x, lanes, _bound(p)[0])
    if dtype is x.dtype and x.numel() <= TINY:
        return torch.where(lanes <= _bound_of(p), _zero(dtype), x)
    return _select_into(x, lanes, _bound(p)[0], torch.empty_like(x, dtype=dtype))


def _select_into(x: Tensor, lanes: Tensor, bound: float, out: Tensor) -> Tensor:
    """_select(x) in out, which may be x."""
    if batched(x):
        return out.copy_(x).masked_fill_(lanes <= bound, 0)
    return torch.ops.aten.threshold_backward.grad_input(x, lanes, bound, grad_input=out)


def _drop_into(out: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    M, K = x.shape
    if not seed.is_cpu:
        return out.copy_(torch.where(reference.dropout_mask(seed, M, K, p), x, 0))
    step = _rows(K)
    for start in range(0, M, step):
        rows = slice(start, min(start + step, M))
        number = seed if start == 0 else _mixed(int(seed) + start)
        _select_into(x[rows], lanes(number, rows.stop - start, K, p), _bound(p)[0], out[rows])
    return out


def _rows(K: int) -> int:
    """How many rows share a hash."""
    return max(TABLE // max(K, 1), 1)


@lru_cache
def _bound(p: float) -> tuple[float, bool]:
    """The largest lane that is dropped, and whether lanes are the hash's bits read as a float.

    2⁻⁸ of all bits are NaN, which is no smaller than anything: above p = 0.996 lanes are the hash's value instead; also
    next to 0.5, where the bound would be a denormal, which a thread may flush to 0 and another not.
    """
    count = reference.dropout_threshold(p) << 16
    bits = 2**32 - 2**23 + 1 - count if count <= _NEGATIVE else count - _NEGATIVE - 1
    if count > 2 * _NEGATIVE or bits % 2**31 < 2**23:
        return float(count - 2**31), False
    return struct.unpack("<f", struct.pack("<I", bits))[0], True  # of none, NaN: nothing is as small


@lru_cache
def _bound_of(p: float) -> Tensor:
    return torch.tensor(_bound(p)[0], dtype=torch.float32, device="cpu")


@lru_cache
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device="cpu")


@lru_cache
def _tables(M: int, K: int) -> tuple[Tensor, Tensor]:
    """c and t: [M, K] int32 on a CPU."""
    c, t = _random(max(TABLE, K))[:, : M * K].view(2, M, K)
    return c, t


@lru_cache
def _random(count: int) -> Tensor:
    """c and t: [2, count] int32, t odd."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (2, count), generator=generator, dtype=torch.int32, device="cpu")
    numbers[1] |= 1
    return numbers


def _mixed(key: int) -> Tensor:
    """[] int64 on a CPU, random bits for each key: SplitMix64's (Steele et al. 2014)."""
    z = (key + 0x9E3779B97F4A7C15) & _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    return torch.tensor((z ^ (z >> 31)) - 2**63, device="cpu")
