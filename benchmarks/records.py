"""What a run leaves behind, one JSON file a suite: {"stamp": {…}, "records": [{…}, …]}. Its fields are a contract."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
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
SUITES = ("linear", "block", "step", "multi", "overhead")


@dataclass(frozen=True)
class Results:
    """One file: its stamp and its records."""

    stamp: dict[str, Any]
    records: list[Record]


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: Any) -> bool:
    return number(value) and value > 0


POSITIVE = ("median_ms", "p20_ms", "p80_ms")
WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", lambda value: isinstance(value, str)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", number),
    "float | None": ("a number or null", lambda value: value is None or number(value)),
}
"""By a field's type: what it takes, in words and as a test."""

STAMPED: dict[str, tuple[type, ...]] = {
    "suite": (str,), "device": (str,), "kind": (str,), "date": (str,), "threads": (int,), "commit": (str, type(None)),
    "dirty": (bool,), "versions": (dict,), "ceilings": (dict,),
}  # fmt: skip
"""What every stamp says and of which type; "refused" and "eager", lines of the gate and the clock, are not in all."""


def write(path: Path, stamp: dict[str, Any], records: Iterable[Record]) -> None:
    """Replace `path` in one step, so that an interrupted run leaves the last whole file."""
    lines = [json.dumps({name.rstrip("_"): value for name, value in asdict(r).items()}) for r in records]
    text = json.dumps({"format": FORMAT, **stamp}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text('{"stamp": ' + text + ',\n"records": [\n' + ",\n".join(lines) + "\n]}\n")
    fresh.replace(path)


def loaded(path: Path) -> Any:
    """What a JSON file holds.   Raises BadInput where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}, wanted a results file (*.json) or a folder of them") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}), wanted what python -m benchmarks or make gpu writes") from error


def read(path: Path) -> Results:
    """The file's stamp and records.   Raises BadInput where it is not a results file of this format."""
    held = loaded(path)
    if not isinstance(held, dict) or not isinstance(held.get("stamp"), dict) or "records" not in held:
        raise BadInput(f'{path}: got no "stamp" beside "records", wanted a file that python -m benchmarks wrote')
    if held["stamp"].get("format") != FORMAT:
        raise BadInput(f"{path}: got results of format {held['stamp'].get('format')}, wanted format {FORMAT}")
    _check_stamp(path, held["stamp"])
    if not isinstance(held["records"], list):
        raise BadInput(f"{path}: got records of type {type(held['records']).__name__}, wanted a list")
    return Results(held["stamp"], [_record(path, index, line) for index, line in enumerate(held["records"])])


def _check_stamp(path: Path, stamp: dict[str, Any]) -> None:
    for name, types in STAMPED.items():
        if name not in stamp:
            raise BadInput(f"{path}: the stamp has no {name}, wanted {', '.join(STAMPED)}")
        if not isinstance(stamp[name], types):
            raise BadInput(f"{path}: the stamp's {name} is {stamp[name]!r}, wanted {types[0].__name__}")
    if stamp["suite"] not in SUITES:
        raise BadInput(f"{path}: the stamp's suite is {stamp['suite']!r}, wanted one of {', '.join(SUITES)}")
    copy, rates = stamp["ceilings"].get("copy_gb_s"), stamp["ceilings"].get("matmul_tflop_s")
    if not (positive(copy) and isinstance(rates, dict) and all(map(positive, rates.values()))):
        raise BadInput(f"{path}: the stamp's ceilings are {stamp['ceilings']}, wanted copy_gb_s and matmul_tflop_s > 0")
    for name in ("refused", "eager"):
        lines = stamp.get(name, [])
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise BadInput(f"{path}: the stamp's {name} is {lines!r}, wanted a list of lines")


def _record(path: Path, index: int, line: Any) -> Record:
    if not isinstance(line, dict) or set(line) != set(NAMES):
        wrong = sorted(set(line) ^ set(NAMES)) if isinstance(line, dict) else line
        raise BadInput(f"{path}: record {index} has the wrong fields: {wrong}")
    for field in fields(Record):
        name = field.name.rstrip("_")
        says, fits = WANTED[str(field.type)] if name not in POSITIVE else ("a positive number", positive)
        if not fits(line[name]):
            raise BadInput(f"{path}: record {index} has {name} {line[name]!r}, wanted {says}")
    return Record(**{field.name: line[field.name.rstrip("_")] for field in fields(Record)})


def read_all(path: Path) -> list[Results]:
    """A results file, or every one of a folder that holds some, by name."""
    if not path.is_dir():
        return [read(path)]
    found = [p for p in sorted(path.glob("*.json")) if p.stem in SUITES]
    if not found:
        raise BadInput(f"{path}: a folder without results, wanted one that holds any of {', '.join(SUITES)} (.json)")
    return [read(p) for p in found]
