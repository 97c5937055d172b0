"""The traffic model: FLOPs and ideal bytes of each pass, as functions of shape and dtype; nothing is launched.

Ideal: every operand of a launch is read once from DRAM and every result written once. Partials, masks and the 8 bytes
of a seed are left out. A layer's work is the sum of its launches'; `fused` and `split` as in `linear`.
"""

from __future__ import annotations

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
    want_dx, want_da, want_db: which gradients backward computes.   fused: one GEMM with a prologue, or the vendor's
    GEMM and an update in place.
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
        """t += scale·f·g in place over t: [M, width], f: [M, R]."""
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


def _of(which: str, forward: Work, backward: Work) -> Work:
    if which not in PASSES:
        raise ValueError(f"which: got {which!r}, wanted one of {PASSES}")
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]
