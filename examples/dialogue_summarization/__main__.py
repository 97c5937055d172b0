"""The lab: prompting, full fine-tuning, LoRA at five ranks and prompt tuning, side by side on dialogues to summarize.

    python examples/dialogue_summarization            # all of it, from small bases that it pretrains: out/lab/
    python examples/dialogue_summarization --quick    # the same, tiny, to see that it all runs
    python examples/dialogue_summarization --model google/flan-t5-base --data dialogues.jsonl

A run that was stopped goes on from its last finished cell when it is started again. `docs/lab.md` says what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the other examples, which this one is made of

import plots
from bases import readings
from dialogues import Example, dialogues, read
from finetune import quiet_libraries
from lab import Data, Lab, Schedule, clocked
from methods import Cell, short_sweep, sweep
from serving import serving
from store import result, settle, whole, write_json
from surroundings import surroundings
from table import show
from tinybase import Size, pretrain
from transformers import set_seed

QUICK = {"steps": 20, "base_steps": 150, "held_out": 16, "general": 8, "seeds": 2, "rounds": 3, "examples": 300}
USUAL = {"steps": 300, "base_steps": 1000, "held_out": 200, "general": 100, "seeds": 3, "rounds": 25, "examples": 8000}
RATES = {"full": 1.5e-3, "lora": 4e-3, "prompt": 1e-1}
GIVEN_RATES = {"full": 5e-5, "lora": 1e-3, "prompt": 1e-1}
"""For models that come pretrained."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/dialogue_summarization",
        description="compare ways to adapt a model to summarize dialogues",
    )

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"got {text}, wanted a whole number ≥ 1")
        return int(text)

    parser.add_argument("--model", help="a causal or seq2seq LM, directory or hub id (default: both, pretrained here)")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="JSON lines of `dialogue` and `summary`")
    parser.add_argument("--out", type=Path, help="for everything (default: out/lab, with --quick out/lab-quick)")
    parser.add_argument("--quick", action="store_true", help="tiny bases and few steps, to see that it all runs")
    parser.add_argument("--only", metavar="ROW,…", help="these rows of the table, such as full,'lora all 16'")
    parser.add_argument(
        "--attention", metavar="NAME,…", help="the model's attention layers (default: as families call them)"
    )
    for name, what in (
        ("steps", "steps of each cell"),
        ("base-steps", "steps that pretrain a base"),
        ("held-out", "dialogues kept for the scores"),
        ("general", "generated dialogues kept for the general task"),
        ("seeds", "runs of each headline row"),
        ("rounds", "timed rounds"),
    ):
        default = USUAL[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=whole_number, help=f"{what} (default: {default})")
    parser.add_argument("--batch", type=whole_number, default=8, help="dialogues a step (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=whole_number, default=512, help="tokens of a prompt (default: %(default)s)"
    )
    for name in RATES:
        parser.add_argument(
            f"--lr-{name}", type=float, help=f"default: {RATES[name]:g}, {GIVEN_RATES[name]:g} with --model"
        )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out = args.out or Path("out/lab-quick" if args.quick else "out/lab")
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name, rate in (GIVEN_RATES if args.model else RATES).items():
        if getattr(args, f"lr_{name}") is None:
            setattr(args, f"lr_{name}", rate)
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures of a run depend on: a run is taken up only with the same."""
    kept = {key: value for key, value in vars(args).items() if key not in ("out", "only", "data", "attention")}
    files = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:16]] for path in args.data or ()]
    return {**kept, "data": files, "attention": args.attention}


def load(args: argparse.Namespace) -> Data:
    """From the files or the generator.   Raises ValueError, OSError."""
    made = list(itertools.islice(dialogues(args.seed), args.examples + args.held_out + args.general))
    general, rest = made[: args.general], made[args.general :]
    if args.data:
        rest = [example for path in args.data for example in read(path)]
        order = sorted(
            range(len(rest)), key=lambda i: hashlib.sha256(f"{args.seed} {rest[i].dialogue}".encode()).digest()
        )
        rest = [rest[i] for i in order]
        if len(rest) < 2 * args.held_out:
            raise ValueError(
                f"--data: got {len(rest)} dialogues, wanted twice the {args.held_out} held out or more (--held-out)"
            )
    return Data(training=rest[args.held_out :], held=rest[: args.held_out], general=general)


def pretrained(kind: str, args: argparse.Namespace, data: Data) -> tuple[str, dict[str, Any]]:
    """The path of a base of the run, made unless it is there, and how it was."""
    folder = args.out / "bases" / kind
    if result(folder) is None:
        examples: list[Example] = list(data.training)
        if args.data:  # its questions come from generated dialogues
            some = itertools.islice(dialogues(args.seed), args.general, args.general + args.examples)
            examples = [e for pair in zip(some, itertools.cycle(data.training), strict=False) for e in pair]
        if args.quick:
            size = Size(hidden=64, layers=2, heads=2, vocab=1000)
        else:
            size = Size(vocab=4000 if args.data else 2000)
        found: dict[str, Any] = {"model": kind}
        with whole(folder) as part:
            set_seed(args.seed)
            with clocked(found, "training"):
                losses = pretrain(
                    str(part),
                    examples,
                    readings(examples, args.seed),
                    size,
                    seq2seq=kind == "seq2seq",
                    steps=args.base_steps,
                    limit=args.max_length,
                    seed=args.seed,
                    scratch=args.out / "trainer",
                )
            write_json(part / "result.json", found | {"training_losses": [round(loss, 4) for loss in losses]})
    return str(folder), result(folder) or {}


def labs(args: argparse.Namespace, data: Data, attention: Sequence[str] | None) -> dict[str, Lab]:
    """The models to adapt, by name."""
    rates = {name: getattr(args, f"lr_{name}") for name in RATES}
    schedule = Schedule(args.steps, args.batch, {**rates, "lora+prompt": rates["lora"]}, args.max_length)
    paths = {"given": args.model} if args.model else {k: pretrained(k, args, data)[0] for k in ("causal", "seq2seq")}
    return {name: Lab(name, path, data, schedule, attention) for name, path in paths.items()}


def plan(args: argparse.Namespace, data: Data) -> list[Cell]:
    """The cells of the run.   Raises ValueError for rows that are none."""
    second = "topic" if all(e.topic for e in (*data.training, *data.held)) else "speakers"
    main, *others = ["given"] if args.model else ["causal", "seq2seq"]
    cells = sweep(main, args.seeds, second) + [cell for model in others for cell in short_sweep(model, args.seeds)]
    if args.only:
        rows, wanted = {cell.row for cell in cells}, {row.strip() for row in args.only.split(",")}
        if wanted - rows:
            raise ValueError(
                f"--only: got {', '.join(sorted(wanted - rows))}, wanted some of {', '.join(sorted(rows))}"
            )
        cells = [cell for cell in cells if cell.row in wanted]
    return cells


def run(args: argparse.Namespace, data: Data, cells: Sequence[Cell], found: dict[str, Lab]) -> dict[str, Any]:
    """Every cell that is not there yet, then all that was found out."""
    for number, cell in enumerate(cells, 1):
        folder = args.out / "cells" / cell.name
        if result(folder) is None:
            start = time.perf_counter()
            with whole(folder) as part:
                lab = found[cell.model]
                write_json(
                    part / "result.json", lab.run(cell, part) | {"seconds": round(time.perf_counter() - start, 2)}
                )
            print(f"   {number:>3}/{len(cells)}  {cell.name:<40}{time.perf_counter() - start:6.1f} s", flush=True)
    results = {"settings": settings(args), **surroundings(next(iter(found.values())).device), "cores": os.cpu_count()}
    results["dialogues"] = len(data.training)
    results["attention"] = {name: list(lab.attention) for name, lab in found.items()}
    results["bases"] = [pretrained(name, args, data)[1] for name in found if name != "given"]
    results["cells"] = [result(args.out / "cells" / cell.name) for cell in cells]
    pair = [c for c in cells if (c.row, c.seed) == ("lora all 16", 0) or c.task != "summary"]
    main = [cell for cell in pair if cell.model == cells[0].model]
    if len(main) == 2:
        folder = args.out / "serving" / main[0].model
        if result(folder) is None:
            paths = [args.out / "cells" / cell.name / "model" for cell in main]
            with whole(folder) as part:
                served = serving(found[main[0].model], *paths, main[1].task, args.rounds)
                write_json(part / "result.json", served)
        results["serving"] = result(folder)
    return results


@contextmanager
def given(what: str) -> Iterator[None]:
    """Says what could not be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{what}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quiet_libraries()
    attention = args.attention.split(",") if args.attention else None
    try:
        data = load(args)
        cells = plan(args, data)
        if args.model:
            with given(f"--model {args.model}"):
                found = labs(args, data, attention)
        settle(args.out, settings(args))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not args.model:
        print("1. The bases, pretrained here: a small Llama and a small T5", flush=True)
        found = labs(args, data, attention)
    count = f"{len(data.training)} dialogues to train on, {len(data.held)} held out"
    print(f"2. {len(cells)} cells; {count}; what is finished stays, in {args.out}/", flush=True)
    results = run(args, data, cells, found)
    write_json(args.out / "results.json", results)
    pictures = plots.draw(results, args.out)
    print(show(results))
    print(f"   {args.out / 'results.json'}, {', '.join(path.name for path in pictures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
