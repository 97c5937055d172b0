"""Install what a GPU's run left: its tables into the kernels' package, its results under benchmarks/results/.

`make adopt FROM=DIR` checks every file first, installs all or none, and prints what changed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.outcome import read_parts
from benchmarks.records import SUITES, BadInput, Results, loaded, read
from fastlora_kernels.tables import FOLDER, Tile

RESULTS = Path(__file__).with_name("results")
SOURCES = ("predicted", "measured")
ARCH = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,5}")
SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")
BOUNDS = {f"{most}{name}" for name in ("M", "N", "K", "R", "masks") for most in ("", "min_", "max_")}
SETS = {"cuda": "gpu", "cpu": "cpu"}
"""The set of cases whose results are kept, by the kind of device: the tiny one is for tests."""


def text_of(table: dict[str, Any]) -> str:
    """A table as it is checked in, one row a line."""

    def listed(rows: list[dict[str, Any]], indent: str) -> str:
        lines = ",\n".join(f"{indent}  {json.dumps(row, ensure_ascii=False)}" for row in rows)
        return f"[\n{lines}\n{indent}]"

    tiles = ",\n".join(f'    "{kernel}": {listed(rows, "    ")}' for kernel, rows in table["tiles"].items())
    overlap = f'  "overlap": {json.dumps(table["overlap"], ensure_ascii=False)},\n' if "overlap" in table else ""
    return f'{{\n  "tiles": {{\n{tiles}\n  }},\n{overlap}  "strategy": {listed(table["strategy"], "  ")}\n}}\n'


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace a table in one step."""
    _replace({path: text_of(table).encode()})


def checked(path: Path) -> dict[str, Any]:
    """The table in a file.   Raises BadInput where the kernels could not use it, or where no clock stands behind it."""
    table = loaded(path)
    try:
        wanted = json.loads((FOLDER / "default.json").read_text())
        if set(table) - {"overlap"} != {"tiles", "strategy"} or set(table["tiles"]) != set(wanted["tiles"]):
            raise BadInput(f"{path}: got parts {sorted(table)}, wanted tiles of {sorted(wanted['tiles'])} and strategy")
        for name, rows in [*table["tiles"].items(), ("strategy", table["strategy"])]:
            for row in rows:
                _check_row(path, name, row)
            bounds = set(rows[-1]) - {"source", "tile", "strategy", "why"}
            if bounds:
                raise BadInput(f"{path}: the last row of {name} has bounds {sorted(bounds)}; it must take every shape")
            if rows[-1].get("tile", {}).get("tma"):
                raise BadInput(f"{path}: the last row of {name} has tma; it must take what no descriptor can address")
        if "overlap" in table:
            _check_overlap(path, table["overlap"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(f"{path}: not a table of tiles and strategies ({type(error).__name__}: {error})") from error
    return table


def _check_row(path: Path, name: str, row: dict[str, Any]) -> None:
    if row["source"] not in SOURCES:
        raise BadInput(f"{path}: a row of {name} has source {row['source']!r}, wanted one of {SOURCES}")
    for bound, value in row.items():
        if bound in BOUNDS and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise BadInput(f"{path}: a row of {name} has {bound} {value!r}, wanted a whole number")
    own = {"source", "dtype", *BOUNDS, *(("strategy", "why", "kernel") if name == "strategy" else ("tile",))}
    if unknown := set(row) - own:
        raise BadInput(f"{path}: a row of {name} has unknown fields {sorted(unknown)}, wanted some of {sorted(own)}")
    if name != "strategy":
        _check_tile(path, name, row["tile"])
    elif row["strategy"] not in ("fused", "split") or not isinstance(row["why"], str):
        raise BadInput(f"{path}: got strategy {row['strategy']!r}, wanted 'fused' or 'split', and why")


def _check_tile(path: Path, name: str, tile: dict[str, Any]) -> None:
    types = {field.name: field.type for field in fields(Tile)}
    if unknown := set(tile) - set(types):
        raise BadInput(f"{path}: a tile of {name} has unknown fields {sorted(unknown)}")
    for field, value in tile.items():
        if types[field] == "bool" and not isinstance(value, bool):
            raise BadInput(f"{path}: a tile of {name} has {field} {value!r}, wanted true or false")
        if types[field] == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadInput(f"{path}: a tile of {name} has {field} {value!r}, wanted a whole number ≥ 1")
    Tile(**tile)


def _check_overlap(path: Path, overlap: dict[str, Any]) -> None:
    if overlap["source"] not in SOURCES:
        raise BadInput(f"{path}: overlap has source {overlap['source']!r}, wanted one of {SOURCES}")
    for what in ("da", "shrink"):
        if not isinstance(overlap[what], bool):
            raise BadInput(f"{path}: overlap has {what} {overlap[what]!r}, wanted true or false")


def _tables(source: Path) -> dict[str, dict[str, Any]]:
    """The tables in a folder that make gpu wrote, by file name."""
    found = sorted([*source.glob("tables/*.json"), *source.glob("sm_*.json"), *source.glob("gfx*.json")])
    for path in found:
        if not ARCH.fullmatch(path.stem) and not (FOLDER / path.name).exists():
            known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
            raise BadInput(f"{path}: got a table of {path.stem!r}, wanted one of {known}, or of another sm_… or gfx…")
    return {path.name: checked(path) for path in found}


def _runs(source: Path) -> dict[Path, Results]:
    """The suites' results in a folder, by path: all of one machine, and of the set of cases that is kept for it."""
    runs = {path: read(path) for path in sorted(source.glob("*.json")) if path.stem in SUITES}
    for path, run in runs.items():
        slug, kind, cases = (run.stamp.get(name) for name in ("slug", "kind", "set"))
        if not isinstance(slug, str) or not SLUG.fullmatch(slug):
            raise BadInput(f"{path}: the stamp's slug is {slug!r}, wanted a folder's name of a-z, 0-9, . and -")
        if run.stamp["suite"] != path.stem:
            raise BadInput(f"{path}: the stamp's suite is {run.stamp['suite']!r}, wanted {path.stem!r}")
        if cases != SETS.get(str(kind)):
            wanted = " or ".join(f"{name!r} on {kind}" for kind, name in SETS.items())
            raise BadInput(f"{path}: results of the set {cases!r} on {kind}, wanted {wanted}")
    if len(slugs := sorted({run.stamp["slug"] for run in runs.values()})) > 1:
        raise BadInput(f"FROM: {source} holds results of {' and '.join(slugs)}, wanted those of one machine")
    return runs


def _outcome(path: Path) -> bytes:
    """run.json with what the report reads of it; its lists of tests and gains stay where they are."""
    parts = read_parts(path)
    kind = loaded(path).get("environment", {}).get("kind")
    if kind not in (None, "cuda"):
        raise BadInput(f"{path}: a run on {kind}, wanted one on a GPU")
    return json.dumps(parts, indent=1).encode() + b"\n"


def adopt(source: Path, tables: Path = FOLDER, results: Path = RESULTS) -> str:
    """Install tables, suites' results and run.json.   Returns the diff of the tables and a line for each other file."""
    if not source.is_dir():
        raise BadInput(f"FROM: got {source}, wanted a folder that make gpu wrote")
    new, runs, outcome = _tables(source), _runs(source), source / "run.json"
    kept = _outcome(outcome) if outcome.exists() else None
    if not new and not runs:
        raise BadInput(f"FROM: {source} holds no tables (tables/*.json) and no results ({', '.join(SUITES)})")
    said, files = [], {}
    for name, table in new.items():
        old = (tables / name).read_text() if (tables / name).exists() else ""
        lines = difflib.unified_diff(
            old.splitlines(), text_of(table).splitlines(), f"a/{name}", f"b/{name}", "", "", 0, ""
        )
        said += list(lines) or [f"{name}: as it is"]
        files[tables / name] = text_of(table).encode()
    for path, run in runs.items():
        target = results / run.stamp["slug"] / path.name
        if target.resolve() != path.resolve():
            files[target] = path.read_bytes()
            said.append(f"{target}: {len(run.records)} records, commit {(run.stamp['commit'] or 'unknown')[:10]}")
    if kept is not None:
        slugs = {run.stamp["slug"] for run in runs.values()}
        files |= {results / slug / "run.json": kept for slug in slugs}
        said += [f"{results / slug / 'run.json'}: what the report reads of it" for slug in slugs]
        said += ["run.json: left out, for no results beside it say whose it is"] * (not slugs)
    _replace(files)
    return "\n".join(said)


def _replace(files: Mapping[Path, bytes]) -> None:
    """Write all files beside their places, then move them there: where one cannot be written, none is."""
    fresh = {path: path.with_suffix(".part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh[path].write_bytes(content)
    except OSError as error:
        for part in fresh.values():
            if part.is_file():
                part.unlink()
        raise BadInput(f"{error.filename}: {error.strerror}, nothing is installed") from error
    for path, part in fresh.items():
        part.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make adopt", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the folder that make gpu wrote ($OUT there)")
    args = parser.parse_args(argv)
    try:
        if not args.source:  # Path("") would be the folder that we are in
            raise BadInput("FROM: got none, wanted make adopt FROM=DIR, a folder that make gpu wrote")
        print(adopt(Path(args.source)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
