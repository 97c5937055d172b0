"""Pictures of a run: ratio to the frozen layer by rows and by rank, overhead by adapters, memory, roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import Record, Results

COLOURS = {
    "frozen": "#777777",
    "fastlora": "#0072b2",
    "peft": "#d55e00",
    "peft-compiled": "#e69f00",
    "reference": "#009e73",
    "unsloth-style": "#cc79a7",
    "lorafusion-style": "#56b4e9",
}
"""Told apart by most colour-blind eyes (Okabe and Ito); others take the rest of the wheel."""
ROWS = "M, rows"
OTHERS = ("#8c564b", "#000000", "#b2df8a")


def _colours(names: Iterable[str]) -> dict[str, str]:
    unknown = iter(OTHERS * 9)
    return {name: COLOURS.get(name) or next(unknown) for name in names}


def _ordered(records: Iterable[Record]) -> list[str]:
    """The implementations, known ones first and in their order."""
    names = {record.impl for record in records}
    return [name for name in COLOURS if name in names] + sorted(names - set(COLOURS))


def _mix(record: Record) -> str:
    return record.dtype if record.dtype == record.adapter_dtype else f"{record.dtype} + {record.adapter_dtype}"


def _panels(records: list[Record], by_rows: bool) -> dict[str, list[Record]]:
    """One panel for each pass, dtype mix and dropout, and for each number of rows where those are not the axis."""
    panels: dict[str, list[Record]] = {}
    for record in records:
        rows = "" if by_rows else f", M = {record.M}"
        panels.setdefault(f"{record.pass_}, {_mix(record)}, p = {record.p:g}{rows}", []).append(record)
    return panels


def _lines(
    path: Path,
    records: list[Record],
    x: Callable[[Record], float],
    y: Callable[[Record], float],
    labels: tuple[str, str],
) -> Path | None:
    """A panel for each pass and dtype; a line an implementation, the median over what else differs."""
    from matplotlib.figure import Figure

    panels = {name: of for name, of in _panels(records, labels[0] == ROWS).items() if len({x(r) for r in of}) > 1}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = _ordered(records)
    colours = _colours(names)
    for axis, (title, of) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            at: dict[float, list[float]] = {}
            for record in of:
                if record.impl == name:
                    at.setdefault(x(record), []).append(y(record))
            points = sorted((place, median(values)) for place, values in at.items())
            if points:
                axis.plot(*zip(*points, strict=True), color=colours[name], label=name, marker="o", markersize=3.5)
        axis.set_xscale("log", base=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(labels[0])
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel(labels[1])
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(7, len(handles)), fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _roofline(path: Path, records: list[Record]) -> Path | None:
    """Time over the least time the machine allows, by rows: 1 is the roof."""
    known = [record for record in records if record.roof_fraction and record.M]
    return _lines(path, known, lambda r: r.M, lambda r: r.roof_fraction or 0, (ROWS, "share of the roof"))


def _compared(records: list[Record]) -> list[Record]:
    return [record for record in records if record.ratio_to_frozen and record.impl != "frozen"]


def draw(run: Results, folder: Path) -> list[Path]:
    """Every plot that the run has data for, as PNG; returns their paths."""
    records, suite = run.records, run.stamp["suite"]
    layers = [record for record in _compared(records) if record.R]
    usual = sorted({record.R for record in layers}, key=lambda R: -sum(record.R == R for record in layers))[:1]
    folder.mkdir(parents=True, exist_ok=True)

    def ratio(record: Record) -> float:
        return record.ratio_to_frozen or 0

    label = "time / frozen layer's"
    by_rows = [record for record in layers if record.R in usual and record.M]
    with_peak = [record for record in records if record.peak_mb is not None and record.M]
    drawn: list[Any] = [
        _lines(folder / f"{suite}-rows.png", by_rows, lambda r: r.M, ratio, (ROWS, label)),
        _lines(folder / f"{suite}-rank.png", layers, lambda r: r.R, ratio, ("R, rank", label)),
        _lines(
            folder / f"{suite}-adapters.png",
            [r for r in layers if r.R in usual],
            lambda r: r.G,
            ratio,
            ("G, adapters", label),
        ),
        _lines(folder / f"{suite}-memory.png", with_peak, lambda r: r.M, lambda r: r.peak_mb or 0, (ROWS, "peak, MiB")),
        _roofline(folder / f"{suite}-roof.png", records),
    ]
    return [path for path in drawn if path is not None]
