"""What the terminal shows of a run: a row per record as results come, and on a TTY a bar of how far it is."""

from __future__ import annotations

import itertools
import sys

from benchmarks.records import Record

HEADER = "  impl              pass       median ms       p20       p80  × frozen   roof  peak MiB     error"
WIDTH = 30


def rows(records: list[Record], refused: list[str]) -> str:
    """The rows of one case, each case's name above its own; what the gate refused has a line without a timing."""
    lines = []
    for case, group in itertools.groupby(records, key=lambda r: r.case):
        lines += [case, *map(_row, group)]
    return "\n".join([*lines, *(f"FAILED, not timed: {line}" for line in refused)])


def _row(r: Record) -> str:
    times = f"{r.median_ms:>11.4f}{r.p20_ms:>10.4f}{r.p80_ms:>10.4f}"
    roof = _cell(r.roof_fraction, 7, ".0%")
    rest = _cell(r.ratio_to_frozen, 10, ".3f") + roof + _cell(r.peak_mb, 10, ".3f") + _cell(r.rel_error, 10, ".1e")
    return f"  {r.impl:<18}{r.pass_:<9}{times}{rest}"


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'–' if value is None else format(value, form):>{width}}"


def bar(done: int, total: int, what: str) -> None:
    """Redraw the bar on stderr; nothing where that is no TTY."""
    if sys.stderr.isatty():
        full = WIDTH * done // max(total, 1)
        sys.stderr.write(f"\r\033[K[{'#' * full}{'.' * (WIDTH - full)}] {done}/{total} {what}")
        sys.stderr.flush()


def clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
