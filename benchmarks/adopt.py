"""Install what a GPU's run left: its tables into the kernels' package, its results under benchmarks/results/.

`make adopt FROM=DIR` checks every file first, installs all or none, and prints what changed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.records import SUITES, BadInput, read
from fastlora_kernels.tables import FOLDER, Tile

RESULTS = Path(__file__).with_name("results")
SOURCES = ("predicted", "measured")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(text_of(table))
    fresh.replace(path)


def checked(path: Path) -> dict[str, Any]:
    """The table in a file.   Raises BadInput where the kernels could not use it, or where no clock stands behind it."""
    try:
        table = json.loads(path.read_text())
        wanted = json.loads((FOLDER / "default.json").read_text())
        if set(table) - {"overlap"} != {"tiles", "strategy"} or set(table["tiles"]) != set(wanted["tiles"]):
            raise BadInput(f"{path}: got parts {sorted(table)}, wanted tiles of {sorted(wanted['tiles'])} and strategy")
        for name, rows in [*table["tiles"].items(), ("strategy", table["strategy"])]:
            for row in rows:
                if row["source"] not in SOURCES:
                    raise BadInput(f"{path}: a row of {name} has source {row['source']!r}, wanted one of {SOURCES}")
                if name == "strategy" and row["strategy"] not in ("fused", "split"):
                    raise BadInput(f"{path}: got strategy {row['strategy']!r}, wanted 'fused' or 'split'")
                if name != "strategy" and (unknown := set(row["tile"]) - {f.name for f in fields(Tile)}):
                    raise BadInput(f"{path}: a tile of {name} has unknown fields {sorted(unknown)}")
            bounds = set(rows[-1]) - {"source", "tile", "strategy", "why"}
            if bounds:
                raise BadInput(f"{path}: the last row of {name} has bounds {sorted(bounds)}; it must take every shape")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: not a table of tiles and strategies ({type(error).__name__}: {error})") from error
    return table


def adopt(source: Path, tables: Path = FOLDER, results: Path = RESULTS) -> str:
    """Install tables and suites' results from `source`.   Returns the diff of the tables and a line a result."""
    if not source.is_dir():
        raise BadInput(f"FROM: got {source}, wanted a folder that make gpu wrote")
    found = sorted([*source.glob("tables/*.json"), *source.glob("sm_*.json"), *source.glob("gfx*.json")])
    new = {path.name: checked(path) for path in found}
    runs = {path: read(path) for path in sorted(source.rglob("*.json")) if path.stem in SUITES}
    if not new and not runs:
        raise BadInput(f"FROM: {source} holds no tables (tables/*.json) and no results ({', '.join(SUITES)})")
    said = []
    for name, table in new.items():
        old = (tables / name).read_text() if (tables / name).exists() else ""
        lines = difflib.unified_diff(
            old.splitlines(), text_of(table).splitlines(), f"a/{name}", f"b/{name}", "", "", 0, ""
        )
        said += list(lines) or [f"{name}: as it is"]
        write(tables / name, table)
    for path, run in runs.items():
        target = results / run.stamp["slug"] / path.name
        if target.resolve() != path.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            said.append(f"{target}: {len(run.records)} records, commit {(run.stamp['commit'] or 'unknown')[:10]}")
    return "\n".join(said)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make adopt", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder that make gpu wrote ($OUT there)")
    args = parser.parse_args(argv)
    try:
        print(adopt(args.source))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
