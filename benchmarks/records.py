"""What a run leaves behind, one JSON file a suite: {"stamp": {…}, "records": [{…}, …]}. Its fields are a contract."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
"""Grows with any change of the fields' names or meanings."""


class BadInput(ValueError):
    """What the user gave cannot be used: the CLI prints one line and exits with 2."""


@dataclass(frozen=True)
class Record:
    """One implementation on one case.

    suite, case, pass_, impl: what was run; together they name the record.   pass_ is "pass" in JSON: forward, backward,
    both, step or call.   median_ms, p20_ms, p80_ms: of the rounds.   peak_mb: most memory above what lay there before
    (MiB), None where it was not measured.   ratio_to_frozen: the median over rounds of this time over the frozen
    layer's in the same round.   roof_fraction: the least time its FLOPs and ideal bytes need on this machine over
    median_ms.   rel_error: the largest relative Frobenius error against float64 among its results.
    M, K, N, R, p: as in the letters, 0 where a case has no one such size; G: adapters.
    dtype: of x and w; adapter_dtype: of a and b.
    """

    suite: str
    case: str
    pass_: str
    impl: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mb: float | None
    ratio_to_frozen: float | None
    roof_fraction: float | None
    rel_error: float | None
    M: int
    K: int
    N: int
    R: int
    dtype: str
    adapter_dtype: str
    p: float
    G: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.pass_, self.impl


NAMES = tuple(field.name.rstrip("_") for field in fields(Record))


@dataclass(frozen=True)
class Results:
    """One file: its stamp and its records."""

    stamp: dict[str, Any]
    records: list[Record]


def write(path: Path, stamp: dict[str, Any], records: Iterable[Record]) -> None:
    """Replace `path` in one step, so that an interrupted run leaves the last whole file."""
    lines = [json.dumps({name.rstrip("_"): value for name, value in asdict(r).items()}) for r in records]
    text = json.dumps({"format": FORMAT, **stamp}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text('{"stamp": ' + text + ',\n"records": [\n' + ",\n".join(lines) + "\n]}\n")
    fresh.replace(path)


def read(path: Path) -> Results:
    """The file's stamp and records.   Raises BadInput where it is not a results file of this format."""
    try:
        held = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}, wanted a results file (*.json) or a folder of them") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}), wanted a results file") from error
    if not isinstance(held, dict) or not isinstance(held.get("stamp"), dict) or "records" not in held:
        raise BadInput(f'{path}: got no "stamp" beside "records", wanted a file that python -m benchmarks wrote')
    if held["stamp"].get("format") != FORMAT:
        raise BadInput(f"{path}: got results of format {held['stamp'].get('format')}, wanted format {FORMAT}")
    records = []
    for number, line in enumerate(held["records"]):
        if not isinstance(line, dict) or set(line) != set(NAMES):
            wrong = sorted(set(line) ^ set(NAMES)) if isinstance(line, dict) else line
            raise BadInput(f"{path}: record {number} has the wrong fields: {wrong}")
        records.append(Record(**{field.name: line[field.name.rstrip("_")] for field in fields(Record)}))
    return Results(held["stamp"], records)


def read_all(path: Path) -> list[Results]:
    """A results file, or every one of a folder that holds some, by name."""
    if not path.is_dir():
        return [read(path)]
    found = [p for p in sorted(path.glob("*.json")) if p.stem in SUITES]
    if not found:
        raise BadInput(f"{path}: a folder without results, wanted one that holds any of {', '.join(SUITES)} (.json)")
    return [read(p) for p in found]


SUITES = ("linear", "block", "step", "multi", "overhead")
