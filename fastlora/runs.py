"""Contiguous runs of rows in a pool of fixed length, first fit."""

from __future__ import annotations


class Runs:
    """Which rows of a pool are taken.   rows: the pool's length.   taken: {first row: rows of the run}."""

    def __init__(self, rows: int, taken: dict[int, int] | None = None) -> None:
        self.rows, self.taken = rows, dict(taken or {})

    def copy(self) -> Runs:
        return Runs(self.rows, self.taken)

    @property
    def free(self) -> int:
        """Rows that nobody has, wherever they lie."""
        return self.rows - sum(self.taken.values())

    def gaps(self) -> list[tuple[int, int]]:
        """(first row, rows) of every free stretch, in order."""
        gaps, end = [], 0
        for start, rows in [*sorted(self.taken.items()), (self.rows, 0)]:
            if start > end:
                gaps.append((end, start - end))
            end = start + rows
        return gaps

    def find(self, rows: int) -> int | None:
        """The first row of the first free stretch that is long enough."""
        return next((start for start, length in self.gaps() if length >= rows), None)

    def take(self, rows: int) -> int | None:
        """Take a run of `rows` ≥ 1 rows; None where no free stretch is long enough."""
        start = self.find(rows)
        if start is not None:
            self.taken[start] = rows
        return start

    def give(self, start: int) -> None:
        """The run that begins at `start` is free again.   Raises KeyError when none does."""
        del self.taken[start]

    def compact(self) -> list[tuple[int, int, int]]:
        """Close all gaps.   Returns (from, to, rows) of each run that moved, down and in an order that is safe."""
        moves, end, taken = [], 0, {}
        for start, rows in sorted(self.taken.items()):
            taken[end] = rows
            if start != end:
                moves.append((start, end, rows))
            end += rows
        self.taken = taken
        return moves
