"""Pictures of a run: ratio to the frozen layer by rows and by rank, overhead by adapters, memory, roofline.

The points of a line differ in the axis alone. Cases that differ in anything else have panels of their own, except for
the layers of `linear`: their median is drawn, of the same layers at each point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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
OTHERS = ("#8c564b", "#000000", "#b2df8a")


def _colours(names: Iterable[str]) -> dict[str, str]:
    unknown = iter(OTHERS * 9)
    return {name: COLOURS.get(name) or next(unknown) for name in names}


def _ordered(records: Iterable[Record]) -> list[str]:
    """The implementations, known ones first and in their order."""
    names = {record.impl for record in records}
    return [name for name in COLOURS if name in names] + sorted(names - set(COLOURS))


@dataclass(frozen=True)
class Axis:
    """label: its own.   of: a record's place on it.   words: what in a case's name says that place, and no more."""

    label: str
    of: Callable[[Record], float]
    words: str

    def rest(self, case: str) -> str:
        """The case's name without its place on the axis."""
        return " ".join(re.sub(self.words, "", case).split())


ROWS = Axis("M, rows", lambda r: r.M, r"\bM\d+\b|\bbatch \d+x\d+\b")
RANK = Axis("R, rank", lambda r: r.R, r"\br\d+\b")
ADAPTERS = Axis("G, adapters", lambda r: r.G, r"(?<=uniform )\d+|(?<=zipf )\d+|(?<=distinct )\d+|(?<=identical )\d+")

Points = list[tuple[float, float]]


def series(records: Iterable[Record], axis: Axis, y: Callable[[Record], float]) -> dict[str, dict[str, Points]]:
    """The points of each implementation by panel, (place on the axis, y); panels of one place are left out."""
    panels: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        layer, _, rest = axis.rest(record.case).partition(" ")
        if record.suite != "linear":
            layer, rest = "", f"{layer} {rest}"
        panels.setdefault((record.pass_, rest), {}).setdefault(layer, []).append(record)
    found = {}
    for (pass_, rest), layers in panels.items():
        places = {layer: {axis.of(record) for record in of} for layer, of in layers.items()}
        widest = max(places.values(), key=len)
        alike = [layer for layer, its in places.items() if its >= widest]
        if len(widest) > 1:
            of = [record for layer in alike for record in layers[layer] if axis.of(record) in widest]
            whose = f"{'median of ' if len(alike) > 1 else ''}{', '.join(alike)}"
            found[f"{pass_}: {rest}\n{whose}".strip()] = _medians(of, axis, y, len(alike))
    return found


def _medians(records: list[Record], axis: Axis, y: Callable[[Record], float], layers: int) -> dict[str, Points]:
    """Of each implementation the median over the layers, where it ran on all of them."""
    at: dict[str, dict[float, list[float]]] = {}
    for record in records:
        at.setdefault(record.impl, {}).setdefault(axis.of(record), []).append(y(record))
    return {
        impl: sorted((place, median(values)) for place, values in points.items() if len(values) == layers)
        for impl, points in at.items()
    }


def _lines(path: Path, records: list[Record], along: Axis, y: Callable[[Record], float], label: str) -> Path | None:
    """A panel for each set of cases that are alike but for the axis; a line an implementation."""
    from matplotlib.figure import Figure

    panels = series(records, along, y)
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = _ordered(records)
    colours = _colours(names)
    for axis, (title, of) in zip(axes.flat, panels.items(), strict=False):
        for index, name in enumerate(names):
            if points := of.get(name):
                style = {"color": colours[name], "label": name, "linewidth": 3.5 - 2.5 * index / len(names)}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, **style)  # the wider are seen below
        axis.set_xscale("log", base=2)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(along.label)
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(7, len(handles)), fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def draw(run: Results, folder: Path) -> list[Path]:
    """Every plot that the run has data for, as PNG; returns their paths. The suite's older ones go."""
    records, suite = run.records, run.stamp["suite"]
    layers = [r for r in records if r.ratio_to_frozen is not None and r.impl != "frozen" and r.R]
    folder.mkdir(parents=True, exist_ok=True)

    def ratio(record: Record) -> float:
        return record.ratio_to_frozen or 0

    over = "time / frozen layer's"
    by_rows = [r for r in layers if r.M]
    with_peak = [r for r in records if r.peak_mb is not None and r.M]
    with_roof = [r for r in records if r.roof_fraction and r.M]  # 1 is the roof: the least time the machine allows
    drawn = [
        _lines(folder / f"{suite}-rows.png", by_rows, ROWS, ratio, over),
        _lines(folder / f"{suite}-rank.png", layers, RANK, ratio, over),
        _lines(folder / f"{suite}-adapters.png", layers, ADAPTERS, ratio, over),
        _lines(folder / f"{suite}-memory.png", with_peak, ROWS, lambda r: r.peak_mb or 0, "peak, MiB"),
        _lines(folder / f"{suite}-roof.png", with_roof, ROWS, lambda r: r.roof_fraction or 0, "share of the roof"),
    ]
    found = [path for path in drawn if path is not None]
    for old in set(folder.glob(f"{suite}-*.png")) - set(found):
        old.unlink()
    return found
