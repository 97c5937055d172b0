"""`python -m benchmarks compare OLD NEW`: what moved beyond noise between two runs; exit code 1 on a regression.

A record moves when its time, relative to the frozen layer's where both runs have that, changes by more than the two
runs' own spreads together and by more than `--noise`. Ratios to the frozen layer cancel a machine's drift. A record
that NEW lost, its case being run there, is a regression as well: the gate refuses what is wrong, however fast it is.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import BadInput, Record, Results, read_all


@dataclass(frozen=True)
class Move:
    """One record in both runs: change = new / old − 1, and what of it may be noise."""

    old: Record
    new: Record
    change: float
    noise: float

    @property
    def moved(self) -> bool:
        return abs(self.change) > self.noise


def spread(record: Record) -> float:
    """Half the distance of the 20 % and 80 % quantiles, relative to the median."""
    return (record.p80_ms - record.p20_ms) / 2 / record.median_ms


def moves(old: list[Record], new: list[Record], least: float) -> list[Move]:
    """The records that both runs hold, largest slow-down first."""
    before = {record.key: record for record in old}
    found = []
    for after in new:
        then = before.get(after.key)
        if then is None:
            continue
        a, b = then.ratio_to_frozen, after.ratio_to_frozen
        change = b / a - 1 if a and b and after.impl != "frozen" else after.median_ms / then.median_ms - 1
        found.append(Move(then, after, change, max(least, spread(then) + spread(after))))
    return sorted(found, key=lambda move: -move.change)


def lost(old: list[Results], new: list[Results]) -> list[tuple[Record, str]]:
    """The records of `old` whose case and pass `new` ran without them, or refused them in, and what it says of each.

    A case that `new` did not come to, its time being up, is not among them.
    """
    there = {record.key for run in new for record in run.records}
    ran = {key[:-1] for key in there}
    refusals = {run.stamp["suite"]: run.stamp.get("refused", []) for run in new}
    found = []
    for record in [record for run in old for record in run.records if record.key not in there]:
        names = f"{record.case} {record.impl}: ", f"{record.case}: "
        why = next((line.split(": ", 1)[1] for line in refusals.get(record.suite, []) if line.startswith(names)), None)
        if why is not None or record.key[:-1] in ran:
            found.append((record, f"refused, {why}" if why is not None else "not in NEW, where others ran it"))
    return found


def table(found: list[Move]) -> str:
    """One line a move."""
    lines = [f"{'change':>8} {'noise':>6} {'old ms':>10} {'new ms':>10}  what"]
    for move in found:
        what = " ".join(move.new.key[1:])
        numbers = f"{move.change:+8.1%} {move.noise:6.1%} {move.old.median_ms:10.4f} {move.new.median_ms:10.4f}"
        lines.append(f"{numbers}  {move.new.suite}: {what}")
    return "\n".join(lines)


def compare(old: Path, new: Path, least: float, impl: str) -> int:
    """Print what moved.   impl: whose slow-down is a regression; "all" for anyone's.   Returns the exit code."""
    if not 0 <= least < 1:
        raise BadInput(f"--noise: got {least}, wanted a share in [0, 1)")
    runs = [read_all(path) for path in (old, new)]
    before, after = ([record for results in run for record in results.records] for run in runs)
    found = moves(before, after, least)
    gone = [(record, why) for record, why in lost(*runs) if impl in ("all", record.impl)]
    if not found and not gone:
        raise BadInput(f"{old} and {new} have no record in common")
    known = {move.new.impl for move in found} | {record.impl for record, _ in gone}
    if impl != "all" and impl not in known:
        raise BadInput(f"--impl: got {impl!r}, wanted all or one of {', '.join(sorted(known))}")
    devices = [run[0].stamp["device"] for run in runs]
    if devices[0] != devices[1]:
        print(f"two machines: {devices[0]} and {devices[1]}; only ratios to the frozen layer can be compared")
    moved = [move for move in found if move.moved]
    slower = [move for move in moved if move.change > 0 and impl in ("all", move.new.impl)]
    if moved:
        print(table(moved))
    for record, why in gone:
        print(f"lost: {record.suite}: {' '.join(record.key[1:])}: {why}")
    only = len({r.key for r in before} ^ {r.key for r in after})
    counts = f"{len(moved)} moved, {len(slower)} slower and {len(gone)} lost ({impl})"
    print(f"{len(found)} compared, {counts}; {only} in one run only")
    return 1 if slower or gone else 0


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser("compare", help="what moved between two runs")
    parser.add_argument("old", type=Path, help="a results file, or a folder of them")
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=0.05, help="changes up to this share are noise (0.05)")
    parser.add_argument("--impl", default="fastlora", help="whose slow-down is a regression (fastlora; all for any)")
    parser.set_defaults(func=lambda args: compare(args.old, args.new, args.noise, args.impl))
