"""Pictures of a run: what rank buys, how the loss falls, what a parameter buys, what is forgotten, nearest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from table import BASE, TITLES, Line, lines

from fastlora.nearest import Neighbours

COLOURS = {
    "shots": "#777777",
    "full": "#000000",
    "all-linear": "#0072b2",
    "attention": "#e69f00",
    "prompt": "#d55e00",
    "lora+prompt": "#009e73",
}
"""By what is trained, told apart by most colour-blind eyes (Okabe and Ito)."""
NAMES = {"shots": "prompting", "full": "full fine-tuning", "all-linear": "LoRA, all linear layers"}
NAMES |= {"attention": "LoRA, attention", "prompt": "prompt tuning", "lora+prompt": "LoRA + soft prompt"}


def group(line: Line) -> str:
    """Its colour's key."""
    cell = line.first
    return cell["targets"] if cell["kind"] == "lora" else cell["kind"]


def _axes(title: str, x: str, y: str, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + (1 if panels == 1 else 0), 4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    figure.suptitle(title, fontsize=11)
    for axis in axes:
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.25)
    return figure, axes


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles = {text: h for axis in axes for h, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def rank(found: Sequence[Line], path: Path) -> Path | None:
    """Scores by rank, with the base, full fine-tuning and the best soft prompt as levels."""
    loras = [line for line in found if line.first["kind"] == "lora"]
    if len({line.first["r"] for line in loras}) < 2:
        return None
    figure, axes = _axes("What rank buys", "R, rank", "", 2)
    for axis, measure in zip(axes, ("rougeL", "loss"), strict=True):
        for targets in ("all-linear", "attention"):
            of = sorted((line for line in loras if line.first["targets"] == targets), key=lambda line: line.first["r"])
            if not of:
                continue
            ranks, scores = [line.first["r"] for line in of], [line.score(measure) for line in of]
            axis.plot(ranks, [s.value for s in scores], color=COLOURS[targets], marker="o", label=NAMES[targets])
            low, high = [s.low for s in scores], [s.high for s in scores]
            axis.fill_between(ranks, low, high, color=COLOURS[targets], alpha=0.15, linewidth=0)
        better = max if measure == "rougeL" else min
        for kind in ("shots", "full", "prompt"):
            of = [line for line in found if line.first["kind"] == kind and (kind != "shots" or line.row == BASE)]
            if of:
                line = better(of, key=lambda line: line.score(measure).value)
                label = {"shots": "base, zero-shot", "full": NAMES["full"]}.get(kind, "best soft prompt")
                level = [line.score(measure).value] * 2
                axis.plot(
                    [min(ranks), max(ranks)], level, color=COLOURS[kind], linestyle="--", linewidth=1, label=label
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.set_ylabel(TITLES.get(measure, "loss a token, held out"))
        if measure == "loss":
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
    _legend(figure, axes)
    return _save(figure, path)


SHOWN = (
    "full",
    "lora all 4",
    "lora all 16",
    "lora all 64",
    "lora attention 16",
    "prompt 20",
    "prompt 50",
    "prompt 100",
)
SHOWN += ("lora all 16 + prompt 20",)


def curves(found: Sequence[Line], path: Path) -> Path | None:
    """Held-out loss as training goes, a panel a model."""
    found = [line for line in found if line.first.get("curve") and line.row in SHOWN]
    models = list(dict.fromkeys(line.model for line in found))
    if not models:
        return None
    figure, axes = _axes("Learning curves", "step", "loss a token, held out", len(models))
    styles = {"4": ":", "64": "--", "20": ":", "100": "--"}
    for axis, model in zip(axes, models, strict=True):
        axis.set_title({"causal": "Llama-shaped", "seq2seq": "T5-shaped"}.get(model, model), fontsize=10)
        for line in found:
            if line.model == model:
                steps, losses = zip(*line.first["curve"], strict=True)
                style = "-" if "+" in line.row else styles.get(line.row.rsplit(" ", 1)[-1], "-")
                axis.plot(steps, losses, color=COLOURS[group(line)], linestyle=style, label=line.row)
        axis.set_ylim(bottom=0)
    _legend(figure, axes)
    return _save(figure, path)


def bought(found: Sequence[Line], path: Path) -> Path | None:
    """Score by trainable parameters."""
    trained = [line for line in found if line.first["trainable"]]
    if not trained:
        return None
    figure, (axis,) = _axes("What a trained parameter buys", "trained parameters", TITLES["rougeL"])
    for line in trained:
        score, key = line.score("rougeL"), group(line)
        error = [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]
        axis.errorbar(
            [line.first["trainable"]], [score.value], error, color=COLOURS[key], fmt="o", capsize=2, label=NAMES[key]
        )
        axis.annotate(
            str(line.first["r"] or line.first["tokens"] or ""), (line.first["trainable"], score.value),
            xytext=(4, -9 if key == "attention" else 4), textcoords="offset points", fontsize=7, color=COLOURS[key],
        )  # fmt: skip
    base = next((line for line in found if line.row == BASE), None)
    if base:
        axis.axhline(base.score("rougeL").value, color=COLOURS["shots"], linestyle="--", label="base, zero-shot")
    axis.set_xscale("log")
    _legend(figure, [axis])
    return _save(figure, path)


def forgotten(found: Sequence[Line], path: Path) -> Path | None:
    """What was learnt beside what is still known."""
    if not any(line.first["trainable"] for line in found):
        return None
    title = "Learnt and forgotten"
    figure, (axis,) = _axes(title, f"summaries: {TITLES['rougeL']}", "general task: answer tokens right")
    for line in found:
        x, y, key = line.score("rougeL"), line.score("general right"), group(line)
        if key == "shots" and line.row != BASE:
            continue
        axis.errorbar([x.value], [y.value], [[y.value - y.low], [y.high - y.value]], color=COLOURS[key], fmt="o",
                      capsize=2, label="base, zero-shot" if key == "shots" else NAMES[key])  # fmt: skip
        axis.annotate(
            str(line.first["r"] or line.first["tokens"] or ""), (x.value, y.value),
            xytext=(4, -9 if key == "attention" else 4), textcoords="offset points", fontsize=7, color=COLOURS[key],
        )  # fmt: skip
    _legend(figure, [axis])
    return _save(figure, path)


def neighbours(found: Sequence[Line], path: Path) -> Path | None:
    """The vocabulary's tokens nearest to the virtual tokens of the shortest soft prompt."""
    near = [line.first["neighbours"] for line in found if line.first.get("neighbours", {}).get("words")]
    if not near:
        return None
    tensors = {key: torch.tensor(value) for key, value in near[0].items() if key in ("ids", "scores", "coordinates")}
    Neighbours(**near[0] | tensors).plot(path)
    return path


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every picture that the run has data for, as PNG in the folder; returns their paths."""
    found = lines(results)
    main = [line for line in found if line.model == found[0].model]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        rank(main, folder / "rank.png"),
        curves(found, folder / "curves.png"),
        bought(main, folder / "parameters.png"),
        forgotten(main, folder / "forgotten.png"),
        neighbours(main, folder / "neighbours.png"),
    ]
    return [path for path in drawn if path is not None]
