"""`python -m benchmarks report`: docs/benchmarks.md from the checked-in JSON, so that no figure is typed by hand."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_verdicts
from benchmarks.outcome import dram_bytes, read_parts
from benchmarks.records import SUITES, BadInput, Record, Results, read
from benchmarks.verdicts import mixed_verdicts, ratios, verdicts

ROOT = Path(__file__).parents[1]

HEAD = """# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/results/`; no figure here is typed by hand. Times are medians
of interleaved rounds, with cold caches in `linear` and `block`, of results that passed the tolerance policy in the same
run. *Ratio* is a time over another's in the same run, case by case: the median over the cases, and in brackets the
worst. Below 1 is faster. Each is first taken over the frozen layer's time in its own round, so that what slows the
whole machine drops out.
"""


def _cell(found: Iterable[float | None]) -> str:
    known = [value for value in found if value is not None]
    return f"{median(known):.2f} ({max(known):.2f})" if known else "–"


def _mix(record: Record) -> str:
    return record.dtype if record.dtype == record.adapter_dtype else f"{record.dtype} + {record.adapter_dtype}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def suite_table(records: list[Record]) -> str:
    """A line for each pass, dtypes and dropout: every implementation's ratio to the frozen layer."""
    names = [name for name in dict.fromkeys(r.impl for r in records) if name != "frozen"]
    groups = sorted({(r.pass_, _mix(r), r.p) for r in records if r.impl != "frozen"})
    rows = []
    for group in groups:
        of = [r for r in records if (r.pass_, _mix(r), r.p) == group]
        pass_, mix, p = group
        cells = [_cell(r.ratio_to_frozen for r in of if r.impl == name) for name in names]
        rows.append([pass_, mix, f"{p:g}", str(len({r.case for r in of})), *cells])
    return _table(["pass", "dtypes", "p", "cases", *(f"{name} / frozen" for name in names)], rows)


def beside_peft(records: list[Record]) -> str:
    """fastlora over PEFT, the same lines."""
    found = ratios(records, "fastlora", "peft")
    groups = sorted({(r.pass_, _mix(r), r.p) for r in found})
    rows = []
    for group in groups:
        of = {r: ratio for r, ratio in found.items() if (r.pass_, _mix(r), r.p) == group}
        worst = max(of, key=lambda r: of[r])
        rows.append([group[0], group[1], f"{group[2]:g}", _cell(of.values()), worst.case])
    return _table(["pass", "dtypes", "p", "fastlora / PEFT", "worst case"], rows) if rows else ""


def overhead_table(records: list[Record]) -> str:
    """Microseconds a call."""
    names = list(dict.fromkeys(r.impl for r in records))
    rows = []
    for case, pass_ in dict.fromkeys((r.case, r.pass_) for r in records):
        at = {r.impl: f"{r.median_ms * 1e3:.1f}" for r in records if (r.case, r.pass_) == (case, pass_)}
        rows.append([case, pass_, *(at.get(name, "–") for name in names)])
    return _table(["case", "pass", *(f"{name}, µs" for name in names)], rows)


def case_table(records: list[Record]) -> str:
    """A line a case: the frozen model's time, and every implementation's ratio to it."""
    names = [name for name in dict.fromkeys(r.impl for r in records) if name != "frozen"]
    rows = []
    for case in dict.fromkeys(r.case for r in records):
        of = {r.impl: r for r in records if r.case == case}
        ratios_of = [of[name].ratio_to_frozen if name in of else None for name in names]
        cells = [f"{ratio:.2f}" if ratio is not None else "–" for ratio in ratios_of]
        rows.append([case, f"{of['frozen'].median_ms:.2f}" if "frozen" in of else "–", *cells])
    return _table(["case", "frozen, ms", *(f"{name} / frozen" for name in names)], rows)


NOTES = {
    "refused": "Refused by the gate, and so not timed",
    "eager": "Timed as it runs, launch by launch from the host, and the others as CUDA graphs: no graph holds",
}
"""What a stamp's lines are about, by its field."""


def noted(stamp: dict[str, Any], what: str) -> str:
    """A stamp's lines, one for each reason; of cases that share it the later ones say where they differ."""
    whose: dict[str, list[str]] = {}
    for line in stamp.get(what, []):
        who, _, why = line.partition(": ")
        whose.setdefault(why, []).append(who)
    found = []
    for why, names in whose.items():
        first, *rest = dict.fromkeys(names)
        found.append(f"- {', '.join([first, *(_differing(first, name) for name in rest)])}: `{why}`")
    return "\n".join([f"{NOTES[what]}:\n", *found]) if found else ""


def _differing(first: str, name: str) -> str:
    words, others = name.split(), first.split()
    same = next((i for i, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]), 0)
    return " ".join(words[same:])


def _stamp(stamp: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
    rates = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in stamp["ceilings"]["matmul_tflop_s"].items())
    ceilings = f"copy {stamp['ceilings']['copy_gb_s']:.3g} GB/s, matmul {rates} TFLOP/s"
    dirty = " with uncommitted changes" if stamp["dirty"] else ""
    commit = (stamp["commit"] or "unknown")[:10]
    where = f"{stamp['date']}, {stamp['threads']} threads, commit `{commit}`{dirty}"
    return f"{where}; {versions}; measured ceilings: {ceilings}."


def section(run: Results, pictures: list[str]) -> str:
    """One suite on one device."""
    parts = [f"### {run.stamp['suite']}", _stamp(run.stamp)]
    if run.stamp["suite"] == "overhead":
        parts.append(overhead_table(run.records))
    elif run.stamp["suite"] == "multi":
        parts += [case_table(run.records), mixed_verdicts(run.records)]
    else:
        parts += [suite_table(run.records), beside_peft(run.records)]
        if run.stamp["kind"] == "cpu":
            parts.append(verdicts(run.records))
    parts += [noted(run.stamp, what) for what in NOTES]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part)


def gpu_section(parts: dict[str, Any]) -> str:
    """What `make gpu` left in run.json: its parts, and DRAM bytes beside the ideal ones."""
    rows = [[name, found["state"], f"{found['seconds']:g}"] for name, found in parts.items()]
    text = "### make gpu\n\n" + _table(["part", "state", "s"], rows)
    lines = [
        [name, f"{moved / 2**20:.1f}", f"{ideal / 2**20:.1f}", f"{moved / ideal:.2f}"]
        for name, (moved, ideal) in dram_bytes(parts).items()
    ]
    if lines:
        text += "\n\n" + _table(["kernel", "DRAM, MiB", "ideal, MiB", "ratio"], lines)
    return text


def targets_section(runs: list[Results], parts: dict[str, Any]) -> str:
    """Each target of a GPU, and whether these runs reached it."""
    head = ["target", "pass", "p", "fastlora", "verdict", "fastlora-patched"]
    return f"### targets\n\n{gpu_verdicts.INTRO}\n\n" + _table(head, [*gpu_verdicts.rows(runs, dram_bytes(parts))])


def report(results: Path, out: Path) -> int:
    """Write the page and its pictures beside it.   Returns the exit code."""
    devices = sorted(path for path in results.glob("*/") if any((path / f"{suite}.json").exists() for suite in SUITES))
    if not devices:
        raise BadInput(f"{results}: no results, wanted <device>/<suite>.json; python -m benchmarks makes them")
    read_first = {
        device: [read(device / f"{s}.json") for s in SUITES if (device / f"{s}.json").exists()] for device in devices
    }
    outcomes = {device: read_parts(device / "run.json") for device in devices if (device / "run.json").exists()}
    try:  # before a picture is drawn beside it
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise BadInput(f"--out: got {str(out)!r}, wanted a file that can be written ({error.strerror})") from error
    parts = [HEAD.strip()]
    for device, runs in read_first.items():
        parts.append(f"## {runs[0].stamp['device']}")
        for run in runs:
            parts.append(section(run, _pictures(run, out.parent / "benchmarks" / device.name, out.parent)))
        if device in outcomes:
            parts.append(gpu_section(outcomes[device]))
        if runs[0].stamp["kind"] == "cuda":
            parts.append(targets_section(runs, outcomes.get(device, {})))
    out.write_text("\n\n".join(parts) + "\n")
    print(out)
    return 0


def _pictures(run: Results, folder: Path, beside: Path) -> list[str]:
    try:
        from benchmarks.plots import draw

        return [str(path.relative_to(beside)) for path in draw(run, folder)]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return []


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser("report", help="docs/benchmarks.md from the results")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks.md")
    parser.set_defaults(func=lambda args: report(args.results, args.out))
