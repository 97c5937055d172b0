"""docs/lab.md from the JSON of runs and the prose of page.md, so that no figure in it is typed by hand.

    python examples/dialogue_summarization/document.py                                  # from docs/lab/*.json
    python examples/dialogue_summarization/document.py out/lab/results.json [MORE …]    # from new runs, kept there

A run on generated dialogues becomes docs/lab/generated.json, one on a file's docs/lab/real.json, without any text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the other examples, as __main__ has them

import plots
from bootstrap import LEVEL, RESAMPLES
from dialogues import SCENES
from methods import DROPOUT, RANKS
from serving import NEW_TOKENS, REQUESTS
from store import write_json
from table import BASE, TITLES, Column, Line, cell, costs, lines, scored, size
from tinybase import Size

HERE = Path(__file__).resolve().parent
TEXTS = ("texts", "references", "dialogue", "neighbours")
"""What a cell says in words."""
ROWS: list[Column] = [("row", lambda line: line.row), ("seeds", lambda line: str(len(line.cells)))]
MODEL: Column = ("model", lambda line: line.model)
R_L = TITLES["rougeL"]

Slots = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def table(of: Iterable[Line], columns: Sequence[Column]) -> str:
    return markdown([name for name, _ in columns], [[make(line) for _, make in columns] for line in of])


def schedule(run: dict[str, Any]) -> Slots:
    ask = run["settings"]
    found = {name: f"{ask[name]:,}" for name in ("base_steps", "steps", "batch")}
    found |= {name: f"{ask[name]:g}" for name in ("lr_full", "lr_lora", "lr_prompt")}
    return {**found, "held": ask["held_out"], "examples": f"{run['dialogues']:,}"}


def stamp(run: dict[str, Any]) -> str:
    """Where, with what and how long."""
    cells, loads = run["cells"], [c["load"] for c in run["cells"]]
    wall = sum(c["seconds"] for c in cells) + sum(b["training_seconds"] for b in run["bases"])
    cpu = sum(c.get(f"{part}_cpu_seconds", 0) for c in cells for part in ("training", "evaluation"))
    cpu += sum(b["training_cpu_seconds"] for b in run["bases"])
    commits = ", ".join(f"`{commit}`" for commit in sorted({c["commit"] or "unknown" for c in cells}))
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"{run['device']}, {run['cores']} cores shared with other jobs (load average {min(loads):.1f} "
        f"to {max(loads):.1f}), {run['threads']} thread{'s' * (run['threads'] > 1)} a process: the bases and "
        f"{len(cells)} cells took {cpu / 60:.0f} minutes of the processor; their clocks, beside those jobs and each "
        f"other, add up to {wall / 60:.0f}. Commit {commits}; {versions}."
    )


def listed(rows: Iterable[Line]) -> str:
    return ", ".join(f"**{line.row}**" for line in rows)


def shots_said(shots: Sequence[Line]) -> str:
    better = [line for line in shots if line.gain("rougeL").low > 0]
    worse = [line for line in shots if line.gain("rougeL").high < 0]
    said = []
    if better:
        said.append(f"Examples help: {listed(better)}.")
    if worse:
        said.append(
            f"Examples in the prompt distract this base rather than help it: {listed(worse)}. Learning from context "
            "comes with scale, and a model this small has little of it."
        )
    return " ".join(said) or "Examples in the prompt make no difference that these dialogues can show."


def over_base(line: Line) -> str:
    """What a line gains, and on which scores its interval and the base's lie apart."""
    assert line.base is not None
    apart = [title for measure, title in TITLES.items() if line.score(measure).apart(line.base.score(measure))]
    where = "on no score" if not apart else "on every score" if len(apart) == len(TITLES) else f"on {', '.join(apart)}"
    seeds = f"; by seed {', '.join(f'{score:.3f}' for score in line.seeds('rougeL'))}" if len(line.cells) > 1 else ""
    return (
        f"**{line.row}** against its base: {cell(line.gain('rougeL'), sign='+')} {R_L}, paired{seeds}. The intervals "
        f"of the two lie apart {where}."
    )


def against(line: Line, full: Line) -> str:
    behind = line.less(full, "rougeL")
    known = "a difference" if behind.sure else "no difference"
    return (
        f"**{line.row}** against **{full.row}**: {cell(behind, sign='+')} {R_L}, {known} beyond doubt, with "
        f"{line.first['trainable'] / line.first['total']:.1%} of the parameters trained and a file of "
        f"{size(line.mean('file'))} instead of {size(full.mean('file'))}."
    )


def plateau(of: Iterable[Line]) -> tuple[int, bool]:
    """The lowest rank that no higher one beats in ROUGE-L beyond doubt; and whether it is lower than the highest."""
    ordered = sorted(of, key=lambda line: line.first["r"])
    for line in ordered:
        higher = [other for other in ordered if other.first["r"] > line.first["r"]]
        if not any(other.less(line, "rougeL").low > 0 for other in higher):
            return line.first["r"], bool(higher)
    raise ValueError("ranks: got none")


def ranks(of: Sequence[Line]) -> str:
    said = []
    for targets, name in (("all-linear", "On all linear layers"), ("attention", "On attention alone")):
        found = [line for line in of if (line.first["kind"], line.first["targets"]) == ("lora", targets)]
        r, early = plateau(found)
        if early:
            said.append(f"{name} the plateau begins at **r = {r}**: no higher rank is better beyond doubt in {R_L}.")
            here, highest = (next(line for line in found if line.first["r"] == rank) for rank in (r, max(RANKS)))
            loss = highest.less(here, "rougeL")
            if loss.high < 0:
                said.append(
                    f"The highest even loses ({cell(loss, sign='+')}). Alpha = 2r keeps the scaling while the product "
                    "of the factors grows with the rank, so that at one learning rate a higher rank takes larger "
                    "steps; we take that for the reason, and have not tried a lower rate."
                )
        else:
            said.append(f"{name} there is no plateau: **r = {r}**, the highest, is better than every lower rank.")
    return " ".join(said)


def prompt_said(best: Line, lora: Line) -> str:
    assert best.base is not None
    behind, gain = best.less(lora, "rougeL"), best.gain("rougeL")
    scores = f"{cell(best.score('rougeL'))} {R_L}, loss {best.score('loss').value:.2f}"
    base = f"{cell(best.base.score('rougeL'))}, loss {best.base.score('loss').value:.2f}"
    found = f"The best soft prompt, **{best.row}**, reaches {scores}; the base has {base}; the difference in {R_L} is "
    found += f"{cell(gain, sign='+')}. Against **{lora.row}** it is {cell(behind, sign='+')}: "
    if behind.high >= 0:
        return found + "it does not trail beyond doubt."
    return found + (
        "prompt tuning trails, as the literature says it does in small models (Lester et al. 2021: it comes close to "
        "full fine-tuning with billions of parameters). The reason is what it may change. LoRA alters what every layer "
        "computes. Virtual tokens are only more to attend to: they call up what the base can do, and hardly teach it "
        "what it cannot. This base has learnt to give short answers, never to put several facts into one text. The "
        f"prompt trains {best.first['trainable']:,} parameters where that LoRA trains {lora.first['trainable']:,}, and "
        "lengthens every sequence, which costs the time and memory above."
    )


def both_said(both: Line, lora: Line) -> str:
    gain = both.less(lora, "rougeL")
    verdict = "adds" if gain.low > 0 else "costs" if gain.high < 0 else "makes no difference beyond doubt:"
    return (
        f"LoRA and a soft prompt in one model, trained together (**{both.row}**; PEFT refuses it): at LoRA's learning "
        f"rate the prompt {verdict} {cell(gain, sign='+')} {R_L} over **{lora.row}**."
    )


def forgetting_said(run: dict[str, Any], of: Sequence[Line]) -> str:
    worst, least = (pick(of, key=lambda line: line.gain("general right").value) for pick in (min, max))
    again = [c["base_again"] for c in run["cells"] if "base_again" in c]
    return (
        f"Of the Llama-shaped model's rows most is lost by **{worst.row}** "
        f"({cell(worst.gain('general right'), sign='+')}), least by **{least.row}** "
        f"({cell(least.gain('general right'), sign='+')}). What full fine-tuning overwrites is gone; an adapter or a "
        "soft prompt can be switched off, and then the model was the base again, to the last bit, in "
        f"{sum(again)} of {len(again)} such runs of this lab."
    )


def served(run: dict[str, Any]) -> Slots:
    found = run["serving"]
    swaps, times = found["swaps"], found["latency"]
    low, high = times["merged"]["quartiles"]
    none = "no latency that could be told from noise" if low <= 1 <= high else f"{times['merged']['ratio'] - 1:+.0%}"
    exact = swaps["exact"] and swaps["base_exact"]
    return {
        "merged_same": found["same_tokens"]["merged"],
        "merged_of": found["same_tokens"]["of"],
        "latency": markdown(
            ["model", "ms", "ratio to the base"],
            [
                [name, f"{t['ms']:.1f}", f"{t['ratio']:.2f} [{t['quartiles'][0]:.2f}, {t['quartiles'][1]:.2f}]"]
                for name, t in times.items()
            ],
        ),
        "latency_said": f"Merging leaves {none}.",
        "task": found["task"],
        "swap_said": f"In {swaps['switches']} switches back and forth, {swaps['milliseconds']:.1f} ms each, the logits "
        f"of either adapter, and last of the base, were {'' if exact else 'not '}the same to the last bit each time.",
        "answers": markdown(
            ["adapter, and what it is asked for", R_L, "word for word"],
            [
                [
                    name.replace("second", found["task"]),
                    f"{a['rougeL']:.3f}",
                    f"{a['exact']} of {found['same_tokens']['of']}",
                ]
                for name, a in found["answers"].items()
            ],
        ),
    }


def sample(cells: Sequence[dict[str, Any]]) -> str:
    """One dialogue's reference, and the summaries of some rows."""
    shown = [c for c in cells if c["seed"] == 0 and c["row"] in (BASE, "full", "lora all 16", "prompt 50")]
    quoted = shown[0]["dialogue"].replace("\n", "  \n> ")
    rows = [["reference", shown[0]["references"][0]], *([c["row"], c["texts"][0] or "(nothing)"] for c in shown)]
    return f"> {quoted}\n\n" + markdown(["", "summary"], rows)


def real(run: dict[str, Any]) -> str:
    of = lines(run)
    trained = [line for line in of if line.base is not None and line.first["trainable"]]
    slots = schedule(run) | {
        "scores": table(of, [MODEL, *ROWS, *scored()]),
        "said": "\n".join(f"- {line.model}, {over_base(line)}" for line in trained),
        "stamp": stamp(run),
    }
    return (HERE / "real.md").read_text("utf-8").format_map(slots).strip()


def page(runs: dict[str, dict[str, Any]]) -> str:
    """The whole of docs/lab.md."""
    run = runs["generated"]
    of = {model: [line for line in lines(run) if line.model == model] for model in ("causal", "seq2seq")}
    trained = {model: [line for line in found if line.first["trainable"]] for model, found in of.items()}
    row = {line.row: line for line in of["causal"]}
    shots = [line for line in of["causal"] if line.first["kind"] == "shots"]
    prompts = [line for line in of["causal"] if line.first["kind"] == "prompt"]
    near = prompts[0].first["neighbours"]
    known: list[Column] = [MODEL, *ROWS, ("loss of answers", lambda line: cell(line.score("general loss"), 2))]
    known += [("answer tokens right", lambda line: cell(line.score("general right")))]
    known += [("against the base", lambda line: cell(line.gain("general right"), sign="+"))]
    compared = [over_base(row["full"]), over_base(row["lora all 16"]), against(row["lora all 16"], row["full"])]
    slots = schedule(run) | served(run)
    slots |= {
        "level": LEVEL,
        "resamples": f"{RESAMPLES:,}",
        "dropout": DROPOUT,
        "width": Size().hidden,
        "scenes": len(SCENES),
        "causal_size": f"{row[BASE].first['total']:,}",
        "seq2seq_size": f"{of['seq2seq'][0].first['total']:,}",
        "shots": table(shots, [*ROWS, *scored()]),
        "shots_said": shots_said([line for line in shots if line.base]),
        "sample": sample([c for line in of["causal"] for c in line.cells]),
        "costs": table(trained["causal"], [*ROWS, *costs()]),
        "scores": table([row[BASE], *trained["causal"]], [*ROWS, *scored()]),
        "comparison": "\n".join(f"- {said}" for said in compared),
        "ranks": ranks(of["causal"]),
        "prompt_said": prompt_said(max(prompts, key=lambda line: line.score("rougeL").value), row["lora all 16"]),
        "both_said": both_said(row["lora all 16 + prompt 20"], row["lora all 16"]),
        "near_tokens": len(near["words"]),
        "near_cosine": f"{sum(scores[0] for scores in near['scores']) / len(near['scores']):.3f}",
        "near_tight": f"{sum(near['tightness']) / len(near['tightness']):.3f}",
        "near_background": f"{near['background']:.3f}",
        "seq2seq_costs": table(trained["seq2seq"], [*ROWS, *costs()]),
        "seq2seq_scores": table(of["seq2seq"], [*ROWS, *scored()]),
        "seq2seq_said": "\n".join(f"- {over_base(line)}" for line in trained["seq2seq"]),
        "general": run["settings"]["general"],
        "forgetting": table([of["causal"][0], *trained["causal"], of["seq2seq"][0], *trained["seq2seq"]], known),
        "forgetting_said": forgetting_said(run, trained["causal"]),
        "new_tokens": NEW_TOKENS,
        "requests": REQUESTS,
        "real": real(runs["real"]) if "real" in runs else "",
        "stamp": stamp(run),
    }
    return re.sub(r"\n{3,}", "\n\n", (HERE / "page.md").read_text("utf-8").format_map(slots))


def keep(path: Path, folder: Path) -> None:
    """Take a run's results into the docs; of a file's dialogues only the figures."""
    run = json.loads(path.read_text("utf-8"))
    name = "real" if run["settings"]["data"] else "generated"
    for extra in [c for c in run["cells"] if "neighbours" in c][1:]:
        del extra["neighbours"]  # the page shows one prompt's
    if name == "real":
        run["cells"] = [{key: value for key, value in c.items() if key not in TEXTS} for c in run["cells"]]
    write_json(folder / f"{name}.json", run, separators=(",", ":"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write docs/lab.md, with its plots, from results.json of runs")
    parser.add_argument("results", type=Path, nargs="*", help="results.json of new runs, to keep in docs/lab")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    args = parser.parse_args(argv)
    folder = args.docs / "lab"
    try:
        for path in args.results:
            keep(path, folder)
        found = {name: folder / f"{name}.json" for name in ("generated", "real")}
        runs = {name: json.loads(path.read_text("utf-8")) for name, path in found.items() if path.exists()}
        if "generated" not in runs:
            raise ValueError(f"results: got no run on generated dialogues, wanted one here or at {found['generated']}")
        text = page(runs)
    except (OSError, ValueError, KeyError) as error:
        said = f"results: got a run without {error}, wanted one of all rows" if isinstance(error, KeyError) else error
        print(f"error: {said}", file=sys.stderr)
        return 2
    plots.draw(runs["generated"], folder)
    part = args.docs / "lab.md.part"
    part.write_text(text, "utf-8")
    part.replace(args.docs / "lab.md")
    print(args.docs / "lab.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
