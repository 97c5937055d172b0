"""From a run's cells to the lines of its table: seeds put together, intervals, differences to the base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bootstrap
import numpy as np
from bootstrap import Array, Interval

MEASURES = ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "general loss", "general right")
TITLES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU"}
BASE = "zero-shot"


@dataclass(frozen=True, eq=False)
class Line:
    """A row of the table: one method on one model.

    cells: of its seeds.   base: the line that it is compared with, or None for that one itself.
    """

    model: str
    row: str
    cells: tuple[dict[str, Any], ...]
    base: Line | None

    def figures(self, measure: str) -> tuple[bootstrap.Score, Array]:
        """How the measure is made of figures, and these of each dialogue, all seeds together: [n, f]."""
        key, columns, score = {
            "loss": ("losses", [0, 1], bootstrap.ratio),
            "bleu": ("bleu", slice(None), bootstrap.bleu),
            "general loss": ("general", [0, 1], bootstrap.ratio),
            "general right": ("general", [2, 1], bootstrap.ratio),
        }.get(measure, (measure, [0], bootstrap.mean))
        each = np.array([cell[key] for cell in self.cells], dtype=np.float64)
        each = each[..., None] if each.ndim == 2 else each
        return score, (each.mean(0) if score is bootstrap.mean else each.sum(0))[:, columns]

    @functools.cache  # noqa: B019  (lines live as long as the process)
    def score(self, measure: str) -> Interval:
        return bootstrap.interval(*self.figures(measure))

    @functools.cache  # noqa: B019
    def gain(self, measure: str) -> Interval:
        """Over the base, dialogue by dialogue."""
        return self.less(self.base or self, measure)

    def less(self, other: Line, measure: str) -> Interval:
        """The difference to another line's."""
        return bootstrap.interval(*self.figures(measure), other.figures(measure)[1])

    def seeds(self, measure: str) -> list[float]:
        """The score of each seed alone."""
        alone = [Line(self.model, self.row, (cell,), None).figures(measure) for cell in self.cells]
        return [float(score(figures[None])[0]) for score, figures in alone]

    @property
    def first(self) -> dict[str, Any]:
        return self.cells[0]

    def mean(self, key: str) -> float | None:
        """Of the seeds; None where no seed has it."""
        known = [cell[key] for cell in self.cells if key in cell]
        return sum(known) / len(known) if known else None


def lines(results: dict[str, Any]) -> list[Line]:
    """The rows about summaries, in the run's order."""
    cells = [cell for cell in results["cells"] if cell["task"] == "summary"]
    found: list[Line] = []
    for model, row in dict.fromkeys((cell["model"], cell["row"]) for cell in cells):
        base = next((line for line in found if (line.model, line.row) == (model, BASE)), None)
        own = tuple(cell for cell in cells if (cell["model"], cell["row"]) == (model, row))
        found.append(Line(model, row, own, base))
    return found


def size(count: float | None) -> str:
    """Bytes, as people read them."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


Column = tuple[str, Callable[[Line], str]]


def costs() -> list[Column]:
    """What a row costs."""
    return [
        ("trained", lambda line: f"{line.first['trainable']:,}"),
        ("share", lambda line: f"{line.first['trainable'] / line.first['total']:.2%}"),
        ("peak", lambda line: size(line.mean("peak"))),
        ("file", lambda line: size(line.mean("file"))),
        ("s", lambda line: _seconds(line.mean("training_seconds"))),
        ("CPU s", lambda line: _seconds(line.mean("training_cpu_seconds"))),
    ]


def scored() -> list[Column]:
    """What a row reaches, with its interval."""

    def column(measure: str) -> Column:
        places = 1 if measure == "bleu" else 3
        return TITLES.get(measure, measure), lambda line: cell(line.score(measure), places)

    return [column(measure) for measure in MEASURES[:6]]


def cell(found: Interval, places: int = 3, sign: str = "") -> str:
    return f"{found.value:{sign}.{places}f} [{found.low:{sign}.{places}f}, {found.high:{sign}.{places}f}]"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def show(results: dict[str, Any]) -> str:
    """The table for a terminal."""

    def short(measure: str, name: str) -> Column:
        return name, lambda line: f"{line.score(measure).value:.3f}"

    columns: list[Column] = [("model", lambda line: line.model), ("row", lambda line: line.row)]
    columns += [("seeds", lambda line: str(len(line.cells))), *costs()]
    columns += [short("loss", "loss"), short("rouge1", "R-1"), short("rouge2", "R-2"), short("rougeL", "R-L")]
    columns += [short("bleu", "BLEU"), short("general right", "general")]
    rows = [[name for name, _ in columns], *([make(line) for _, make in columns] for line in lines(results))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<" + ">" * len(columns[2:])
    return "\n".join(
        "   " + "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True))
        for row in rows
    )
