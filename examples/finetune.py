"""Fine-tune a causal LM to summarise dialogues: PEFT's LoraConfig, fastlora.patch, the Hugging Face Trainer.

    python examples/finetune.py                                           # all that it needs is here
    python examples/finetune.py --model DIR_OR_ID --data dialogues.jsonl  # your own

It shows the loss falling, ROUGE on held-out dialogues before and after, PEFT's own layers beside ours (losses at p = 0,
time and memory of a step), and that the saved adapter loads in plain PEFT and merges to a model of the same tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import beside
import torch
from dialogues import Example, dialogues, read
from judge import MEASURES, Judge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from surroundings import surroundings
from tinybase import Size, make
from training import Collate, ends, row, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

import fastlora

TOLERANCE = 1e-4
"""The most that a loss may differ from PEFT's, relatively, at any step of the comparison at p = 0."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="fine-tune a causal LM to summarise dialogues, with PEFT and fastlora")
    parser.add_argument("--model", help="a causal LM, directory or hub id (default: a small Llama, pretrained here)")
    parser.add_argument("--data", type=Path, help="JSON lines with `dialogue` and `summary` (default: generated)")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="for adapter and report (%(default)s)")
    parser.add_argument("--steps", type=int, help="steps of the fine-tune (default: 400)")
    parser.add_argument("--base-steps", type=int, help="steps that pretrain the small Llama (default: 600)")
    parser.add_argument("--batch", type=int, default=8, help="dialogues a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (default: 4e-3; 2e-4 with --model)")
    parser.add_argument("--r", type=int, default=16, help="rank; alpha is twice that (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--held-out", type=int, help="dialogues kept for ROUGE (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few steps, to see that it all runs")
    args = parser.parse_args(argv)
    args.steps = args.steps or (30 if args.quick else 400)
    args.base_steps = args.base_steps or (30 if args.quick else 600)
    args.lr = args.lr or (2e-4 if args.model else 4e-3)
    args.held_out = args.held_out or (8 if args.quick else 64)
    return args


@contextlib.contextmanager
def given(what: str) -> Iterator[None]:
    """What a person gave and cannot be used ends the run with one line and exit code 2."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        print(f"error: {what}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def load(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(for training, held out), from the file or the generator."""
    if args.data is None:
        count = 200 if args.quick else 8000
        examples = list(itertools.islice(dialogues(args.seed), count + args.held_out))
    else:
        examples = read(args.data)
        random.Random(args.seed).shuffle(examples)
    if len(examples) <= args.held_out:
        raise ValueError(f"{args.data}: got {len(examples)} dialogues, wanted more than the {args.held_out} held out")
    return examples[args.held_out :], examples[: args.held_out]


def with_lora(base: PreTrainedModel, args: argparse.Namespace, dropout: float) -> PeftModel:
    """PEFT's model over base, its adapter drawn from the run's seed."""
    set_seed(args.seed)
    alpha, target = 2 * args.r, "all-linear"
    config = LoraConfig(r=args.r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def show_losses(losses: Sequence[float]) -> None:
    """A line that falls as the losses do, and their means over the first and the last tenth of the steps."""
    size = -(-len(losses) // 60)
    means = [sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size))]
    low, span = min(means), max(max(means) - min(means), 1e-9)
    line = "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)
    first, last = ends(losses)
    print(f"   loss {first:.3f} {line} {last:.3f}   ({len(losses)} steps)", flush=True)


def show_steps(steps: dict[str, beside.Step], dropout: float) -> dict[str, Any]:
    """A step of PEFT's beside ours, printed and as figures."""
    peft, ours = steps["peft"], steps["fastlora"]
    figures = {
        "ms a step": (1e3 * peft.median, 1e3 * ours.median, beside.ratio(steps)),
        "MiB kept for backward": (peft.saved / 2**20, ours.saved / 2**20, ours.saved / peft.saved),
        "MiB at its peak": (peft.peak / 2**20, ours.peak / 2**20, ours.peak / peft.peak),
    }
    print(f"   {f'p = {dropout}':<24}{'PEFT':>9}{'fastlora':>10}{'ratio':>8}")
    for name, (theirs, mine, ratio) in figures.items():
        print(f"   {name:<24}{theirs:>9.1f}{mine:>10.1f}{ratio:>8.2f}", flush=True)
    return {name: dict(zip(("peft", "fastlora", "ratio"), values, strict=True)) for name, values in figures.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    began = time.perf_counter()
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scratch, adapter = args.out / "trainer", args.out / "adapter"
    report: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    report |= surroundings(device)
    with given("--data"):
        training, held = load(args)

    path = args.model or str(args.out / "base")
    print(f"1. The base, {args.model or 'a small Llama'}; {len(training)} dialogues to train on, {len(held)} held out")
    if args.model is None:
        size = Size(hidden=64, layers=2, heads=2, vocab=1000) if args.quick else Size()
        task = "questions on the dialogues" if training[0].asks else "the dialogues' own text"
        print(f"   pretrained here in full, on {task}, without any summary:", flush=True)
        report["pretraining"] = make(
            path, training, size, steps=args.base_steps, limit=args.max_length, seed=args.seed, scratch=scratch
        )
        show_losses(report["pretraining"])

    def open_base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device)

    with given(f"--model {path}"):
        tokenizer, base = AutoTokenizer.from_pretrained(path), open_base()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows, held_rows = (
        [row(tokenizer, [(example.prompt, False), (f" {example.summary}", True)], args.max_length) for example in part]
        for part in (training, held)
    )
    judge = Judge(tokenizer, held_rows, [example.summary for example in held])
    collate = Collate(tokenizer.pad_token_id)
    fit = partial(
        train, rows=rows, pad=tokenizer.pad_token_id, batch=args.batch, lr=args.lr, seed=args.seed, scratch=scratch
    )
    batches = [
        {key: tensor.to(device) for key, tensor in collate(rows[start : start + args.batch]).items()}
        for start in range(0, 4 * args.batch, args.batch)
    ]
    rounds = 3 if args.quick else 20

    report["before"] = judge.score(base, judge.write(base))

    print("2. PEFT's layers beside fastlora's, p = 0: the same adapter, the same batches", flush=True)
    model = with_lora(base, args, dropout=0.0)
    both = beside.losses(model, partial(fit, steps=5 if args.quick else 20))
    gap = beside.largest_gap(both)
    for step in sorted({0, len(both["peft"]) // 2, len(both["peft"]) - 1}):
        print(f"   loss of step {step + 1:<3}  PEFT {both['peft'][step]:.6f}   fastlora {both['fastlora'][step]:.6f}")
    print(f"   they differ by at most {gap:.1e} (relatively; allowed: {TOLERANCE:.0e})")
    report["beside"] = {"losses": both, "largest_gap": gap, "tolerance": TOLERANCE}
    report["steps"] = {"p = 0": show_steps(beside.steps(model, batches, rounds), 0)}
    base = model.unload()

    print(f"3. The fine-tune, with LoRA of rank {args.r} and dropout {args.dropout}", flush=True)
    model = with_lora(base, args, args.dropout)
    trainable, total = model.get_nb_trainable_parameters()
    print(f"   {trainable:,} of {total:,} parameters are trained: {trainable / total:.2%}")
    report["parameters"] = {"trainable": trainable, "total": total}
    report["steps"][f"p = {args.dropout}"] = show_steps(beside.steps(model, batches, rounds), args.dropout)
    patched = fastlora.patch(model)
    print(patched)
    report["patch"] = {"patched": len(patched.patched), "skipped": patched.skipped}
    report["training"] = fit(model, steps=args.steps)
    show_losses(report["training"])
    ours = judge.write(model)
    report["after"] = judge.score(model, ours)

    print("4. The adapter, saved, loaded by plain PEFT, and merged", flush=True)
    model.save_pretrained(adapter)
    plain = PeftModel.from_pretrained(open_base(), adapter)
    loaded = judge.write(plain)
    merged = judge.write(plain.merge_and_unload())
    report["same_tokens"] = {
        "held_out": len(ours),
        "loaded": sum(map(list.__eq__, ours, loaded)),
        "merged": sum(map(list.__eq__, ours, merged)),
    }
    print(f"   same tokens for {report['same_tokens']['loaded']} of {len(ours)} held-out dialogues once loaded,")
    print(f"   for {report['same_tokens']['merged']} once merged")
    report["seconds"] = time.perf_counter() - began
    show_summaries(held[:2], judge.read(ours))
    show_table(report, args.dropout)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"   {report['seconds']:.0f} s on {report['device']}, {report['threads']} threads; all of it is in {args.out}/"
    )


def quiet_libraries() -> None:
    """Progress bars on a terminal only, and no advice from libraries to their developers."""
    if not sys.stdout.isatty():
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def show_summaries(examples: Sequence[Example], summaries: Sequence[str]) -> None:
    for example, summary in zip(examples, summaries, strict=False):
        print("\n   | " + example.dialogue.replace("\n", "\n   | "))
        print(f"   reference: {example.summary}\n   written:   {summary}")


def show_table(report: dict[str, Any], dropout: float) -> None:
    """What the run showed, in one place."""
    print(f"\n   {'held out':<28}{'before':>9}{'after':>9}")
    for measure in ("loss", *MEASURES):
        print(f"   {measure:<28}{report['before'][measure]:>9.3f}{report['after'][measure]:>9.3f}")
    step, parameters, same = report["steps"][f"p = {dropout}"], report["parameters"], report["same_tokens"]
    facts = {
        "parameters trained": f"{parameters['trainable'] / parameters['total']:.2%}",
        "losses, ours − PEFT's": f"≤ {report['beside']['largest_gap']:.0e}",
        "time of a step, ours / PEFT's": f"{step['ms a step']['ratio']:.2f}",
        "kept for backward, ours / PEFT's": f"{step['MiB kept for backward']['ratio']:.2f}",
        "same tokens in plain PEFT, merged": f"{same['merged']}/{same['held_out']}",
    }
    for name, value in facts.items():
        print(f"   {name:<34}{value:>12}")


if __name__ == "__main__":
    main()
