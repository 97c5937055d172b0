"""The traffic model: FLOPs and ideal bytes of each pass, as functions of shape and dtype; nothing is launched.

Ideal: every operand of a launch is read once from DRAM and every result written once. Partials, masks and the 8 bytes
of a seed are left out. A layer's work is the sum of its launches'; `fused` and `split` as in `linear`. A group's is
less than its layers': x is read once for every h and once for every da, and dx is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

FP32 = 4
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Work:
    """FLOPs (a multiply-add is two) and bytes that cross DRAM."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The least time for it.   rate: FLOP/s.   bandwidth: bytes/s."""
        return max(self.flops / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class Layer:
    """The work of one layer's launches.

    M, K, N, R: as in the letters.   main, adapter: bytes of an element of x, w, dy and of a, b; h and dh are fp32.
    want_dx, want_da, want_db: which gradients backward computes.   fused: one GEMM with a prologue, or a launch
    for the low-rank term and the vendor's GEMM, which adds to it.
    """

    M: int
    K: int
    N: int
    R: int
    main: int = 2
    adapter: int = 2
    want_dx: bool = True
    want_da: bool = True
    want_db: bool = True
    fused: bool = True

    def shrink(self) -> Work:
        """h = drop(x)·aᵀ."""
        M, K, R = self.M, self.K, self.R
        return Work(2 * M * K * R, M * K * self.main + R * K * self.adapter + M * R * FP32)

    def expand(self) -> Work:
        """y = x·wᵀ + scale·h·bᵀ in one GEMM."""
        M, K, N, R = self.M, self.K, self.N, self.R
        big = (M * K + N * K + M * N) * self.main
        return Work(2 * M * N * (K + R), big + M * R * FP32 + N * R * self.adapter)

    def add(self, width: int) -> Work:
        """t += scale·f·g over t: [M, width], f: [M, R]; or t = scale·f·g, and what a GEMM reads of t as it adds."""
        M, R = self.M, self.R
        return Work(2 * M * width * R, 2 * M * width * self.main + M * R * FP32 + R * width * self.adapter)

    def dy(self) -> Work:
        """dh = scale·dy·b   and   db = scale·dyᵀ·h, dy read once."""
        M, N, R = self.M, self.N, self.R
        want_dh = self.want_dx or self.want_da
        if not (want_dh or self.want_db):
            return Work()
        work = Work(0, M * N * self.main)
        if want_dh:
            work += Work(2 * M * N * R, N * R * self.adapter + M * R * FP32)
        if self.want_db:
            work += Work(2 * M * N * R, M * R * FP32 + N * R * self.adapter)
        return work

    def x(self) -> Work:
        """da = dhᵀ·drop(x)."""
        M, K, R = self.M, self.K, self.R
        if not self.want_da:
            return Work()
        return Work(2 * M * K * R, M * K * self.main + M * R * FP32 + R * K * self.adapter)

    def dx(self) -> Work:
        """dx = dy·w + mask/(1−p) ⊙ (dh·a) in one GEMM."""
        M, K, N, R = self.M, self.K, self.N, self.R
        if not self.want_dx:
            return Work()
        big = (M * N + N * K + M * K) * self.main
        return Work(2 * M * K * (N + R), big + M * R * FP32 + R * K * self.adapter)

    def frozen(self, which: str) -> Work:
        """The frozen layer alone: y = x·wᵀ; dx = dy·w."""
        M, K, N = self.M, self.K, self.N
        gemm = Work(2 * M * N * K, (M * K + N * K + M * N) * self.main)
        return _of(which, gemm, gemm if self.want_dx else Work())

    def lora(self, which: str) -> Work:
        """The whole layer.   which: "forward", "backward" or "both"."""
        if self.fused:
            return _of(which, self.shrink() + self.expand(), self.dy() + self.x() + self.dx())
        update = self.add(self.K) if self.want_dx else Work()
        return self.frozen(which) + _of(which, self.shrink() + self.add(self.N), self.dy() + self.x() + update)


@dataclass(frozen=True)
class JobsLayer:
    """The work of one frozen layer whose rows belong to several jobs, each with factors of its own.

    rows, ranks: M and R of each job.   base_rows: rows of nobody.   The rest as in `Layer`; the base's products are the
    vendor's, and the jobs' terms land on them in place.
    """

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    K: int
    N: int
    base_rows: int = 0
    main: int = 2
    adapter: int = 4

    def _thin(self, width: int) -> Work:
        """A product of the jobs' rows, [M_j, width], with their factors: read, and h or dh passed on or taken up."""
        flops = sum(2 * M * width * R for M, R in zip(self.rows, self.ranks, strict=True))
        h = sum(M * R for M, R in zip(self.rows, self.ranks, strict=True)) * FP32
        return Work(flops, sum(self.rows) * width * self.main + sum(self.ranks) * width * self.adapter + h)

    def shrink(self) -> Work:
        """h = drop(x)·aᵀ on each job's rows."""
        return self._thin(self.K)

    def expand(self) -> Work:
        """y += scale·h·bᵀ on each job's rows: read and written."""
        return self._thin(self.N) + Work(0, sum(self.rows) * self.N * self.main)

    def dy(self) -> Work:
        """dh = scale·dy·b, and db = scale·hᵀ·dy: dy is read by either."""
        return self._thin(self.N) + self._thin(self.N)

    def x(self) -> Work:
        """da = dhᵀ·drop(x)."""
        return self._thin(self.K)

    def dx(self) -> Work:
        """dx += mask/(1−p) ⊙ (dh·a): read and written."""
        return self._thin(self.K) + Work(0, sum(self.rows) * self.K * self.main)

    def lora(self, which: str) -> Work:
        """The whole layer.   which: "forward", "backward" or "both"."""
        M = sum(self.rows) + self.base_rows
        base = Layer(M, self.K, self.N, 1, self.main)
        return base.frozen(which) + _of(which, self.shrink() + self.expand(), self.dy() + self.x() + self.dx())


@dataclass(frozen=True)
class Group:
    """The work of the launches of layers that share one input, each with its own N, R and wants.

    members: layers of one M, K and main; one of rank 0 has no adapter.   fused: dx as one accumulator over all members,
    or a launch for the low-rank terms and the vendor's GEMMs, each adding to what was before.
    """

    members: tuple[Layer, ...]
    fused: bool = True

    def shrink(self) -> Work:
        """[h₀ | h₁ | …]: x read once."""
        return self._once(Layer.shrink, self.adapted)

    def expand(self) -> Work:
        """Every y, back to back."""
        return _sum(m.expand() if m.R else m.frozen("forward") for m in self.members)

    def dy(self) -> Work:
        """Every dh and db; a dy is its member's alone."""
        return _sum(m.dy() for m in self.adapted)

    def x(self) -> Work:
        """Every da: x read once."""
        return self._once(Layer.x, tuple(m for m in self.adapted if m.want_da))

    def dx(self) -> Work:
        """dx = Σ dy·w + mask/(1−p) ⊙ (dh·a), written once."""
        total, first = _sum(m.dx() for m in self.members), self.members[0]
        again = len([m for m in self.members if m.want_dx]) - 1
        return total + Work(0, -max(again, 0) * first.M * first.K * first.main)

    def low_rank_dx(self) -> Work:
        """dx = Σ mask/(1−p) ⊙ (dh·a), and what the first GEMM reads of it."""
        wanting = tuple(m for m in self.adapted if m.want_dx)
        M, K, main = self.members[0].M, self.members[0].K, self.members[0].main
        return _sum(m.add(K) for m in wanting) + Work(0, -2 * max(len(wanting) - 1, 0) * M * K * main)

    def frozen(self, which: str) -> Work:
        """The frozen layers: y = x·wᵀ each; dx = dy·w each, every one after the first read and written again."""
        return _sum(m.frozen(which) for m in self.members) + self._sums(which)

    def lora(self, which: str) -> Work:
        """The whole group.   which: "forward", "backward" or "both"."""
        passes = self.dy() + self.x()
        if self.fused:
            return _of(which, self.shrink() + self.expand(), passes + self.dx())
        forward = self.shrink() + _sum(
            m.frozen("forward") + m.add(m.N) if m.R else m.frozen("forward") for m in self.members
        )
        gemms = _sum(m.frozen("backward") for m in self.members) + self._sums("backward")
        return _of(which, forward, passes + gemms + self.low_rank_dx())

    @property
    def adapted(self) -> tuple[Layer, ...]:
        return tuple(m for m in self.members if m.R)

    def _once(self, one: Callable[[Layer], Work], members: tuple[Layer, ...]) -> Work:
        """The members' work with their x read once."""
        first = self.members[0]
        return _sum(map(one, members)) + Work(0, -max(len(members) - 1, 0) * first.M * first.K * first.main)

    def _sums(self, which: str) -> Work:
        """What adding one GEMM's dx to another's reads: a GEMM that adds reads what it writes."""
        first, dxs = self.members[0], len([m for m in self.members if m.want_dx])
        return _of(which, Work(), Work(0, max(dxs - 1, 0) * first.M * first.K * first.main))


@dataclass(frozen=True)
class Gated:
    """The work between the layers of a gated MLP, down's shrink included: its own then reads nothing.

    M, R: as in the letters, R of down, 0 without an adapter.   width: out features of gate and up.   main, adapter: as
    in `Layer`.
    """

    M: int
    width: int
    R: int
    main: int = 2
    adapter: int = 2

    def glu(self) -> Work:
        """z = act(g) ⊙ u and h = drop(z)·aᵀ: g and u read, z written."""
        M, K, R = self.M, self.width, self.R
        factors = R * K * self.adapter + M * R * FP32
        return Work(2 * M * K * R, 3 * M * K * self.main + factors)

    def backward(self, want_z: bool = True) -> Work:
        """dg, du and z again: g, u and dz read, as much written."""
        return Work(0, (6 if want_z else 5) * self.M * self.width * self.main)


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _of(which: str, forward: Work, backward: Work) -> Work:
    if which not in PASSES:
        raise ValueError(f"which: got {which!r}, wanted one of {PASSES}")
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]
