"""One base model, one batch, every request its own tenant: a LoRA adapter of any rank, a soft prompt, both, neither.

    python examples/multi_tenant.py                                            # trains its tenants first
    python examples/multi_tenant.py --model DIR_OR_ID --adapters DIR [DIR …]   # your own, from PEFT's folders

It answers one mixed batch through `fastlora.AdapterBank`, in fp32, checks each answer against plain PEFT with that
adapter alone, and counts tokens per second beside PEFT's own mixed batch and beside one tenant at a time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plain_peft
import torch
from dialogues import Example, dialogues
from finetune import given, quiet_libraries
from plain_peft import Request, answers, padded
from surroundings import surroundings
from tasks import text_of, train_tenants
from tinybase import Size, make
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fastlora

LIMIT = 512
"""Tokens of an example in training."""


def whole(text: str) -> int:
    """A number ≥ 1 of the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a whole number ≥ 1")
    return number


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="answer one batch of requests, each with an adapter of its own")
    parser.add_argument("--model", help="a causal LM, directory or hub id (default: a small Llama)")
    parser.add_argument("--adapters", nargs="+", type=Path, metavar="DIR", help="PEFT folders (default: trained here)")
    parser.add_argument("--requests", type=Path, help="a text a line (default: generated dialogues)")
    parser.add_argument("--out", type=Path, default=Path("out/multi_tenant"), help="for adapters, report (%(default)s)")
    parser.add_argument("--base", type=Path, default=Path("out/finetune/base"), help="the small Llama (%(default)s)")
    parser.add_argument("--steps", type=whole, help="steps that train each tenant (default: 200)")
    parser.add_argument("--batch", type=whole, default=16, help="requests in the batch (default: %(default)s)")
    parser.add_argument("--tokens", type=whole, default=24, help="new tokens a request (default: %(default)s)")
    parser.add_argument("--rounds", type=whole, help="timed rounds (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few steps, to see that it all runs")
    args = parser.parse_args(argv)
    args.steps = args.steps or (3 if args.quick else 200)
    args.rounds = args.rounds or (2 if args.quick else 7)
    for folder in args.adapters or ():
        if not (folder / "adapter_config.json").exists():
            parser.error(f"--adapters: {folder} holds no adapter_config.json, wanted a folder that PEFT saved")
    if args.requests and not (args.requests.is_file() and args.requests.read_text("utf-8").strip()):
        parser.error(f"--requests: {args.requests} holds no text, wanted a file with a request a line")
    return args


def base_of(args: argparse.Namespace, examples: Sequence[Example]) -> str:
    """Where the model lies; the default one is what the fine-tune pretrained, or a shorter-trained one made here."""
    if args.model:
        return str(args.model)
    if not args.quick and fits(args.base, args.seed):
        return str(args.base)
    print("   no base of the fine-tune's to take: pretrained here, briefly", flush=True)
    path, scratch, steps = str(args.out / "base"), args.out / "trainer", 5 if args.quick else 300
    size = Size(hidden=64, layers=2, heads=2, vocab=1000) if args.quick else Size()
    make(path, examples, size, steps=steps, limit=LIMIT, seed=args.seed, scratch=scratch)
    return path


def fits(base: Path, seed: int) -> bool:
    """Whether the fine-tune pretrained this one in full, on the generator's dialogues of this seed."""
    report = base.parent / "report.json"
    if not (report.exists() and (base / "config.json").exists()):
        return False
    said = json.loads(report.read_text())["arguments"]
    wanted = {"model": "None", "data": "None", "quick": "False", "seed": str(seed)}
    return {key: said.get(key) for key in wanted} == wanted


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their own names, numbered from the second of a name on."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        found[next(name for name in names if name not in found)] = folder
    return found


def mix(texts: Sequence[str], loras: Sequence[str], prompts: Sequence[str], count: int) -> list[Request]:
    """Requests of each tenant in turn: each adapter, each prompt, one with both, the base."""
    tenants: list[tuple[str | None, str | None]] = [(name, None) for name in loras]
    tenants += [(None, name) for name in prompts] + [(None, None)]
    if loras and prompts:
        tenants.append((loras[0], prompts[0]))
    return [Request(text, *tenant) for text, tenant in zip(texts, itertools.cycle(tenants), strict=False)][:count]


def race(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side."""
    return {name: statistics.median(times) for name, times in turns(sides, rounds).items()}


def turns(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each side, interleaved, each going first in turn; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            sides[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet_libraries()
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT's, of its prompts' positions
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    report |= surroundings(device.type)
    count = 60 if args.quick else 2000
    examples = list(itertools.islice(dialogues(args.seed), args.batch + count))
    training, held = examples[args.batch :], examples[: args.batch]

    print("1. The tenants", flush=True)
    path = base_of(args, training)
    with given("--model"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.adapters:
        folders = named(args.adapters)
    else:
        folders = train_tenants(path, training, args.out, steps=args.steps, limit=LIMIT, seed=args.seed)
    served = copy.deepcopy(model)
    bank = fastlora.AdapterBank(served, max_loras=len(folders), max_prompts=len(folders))
    for name, folder in folders.items():
        with given(f"--adapters: {folder}"):
            bank.load_adapter(folder, name)
    listed = bank.list_adapters()
    loras, prompts = ([entry.name for entry in listed if entry.kind == kind] for kind in ("lora", "prompt"))

    texts = [text_of(example) for example in held]
    if args.requests:
        texts = [line for line in args.requests.read_text("utf-8").splitlines() if line.strip()]
    requests = mix(texts, loras, prompts, args.batch)
    print(f"2. One batch of {len(requests)} requests to {path}", flush=True)
    batch = padded(tokenizer, [request.text for request in requests], device)

    def answer(use_prompts: bool = True, **more: Any) -> list[list[int]]:
        ahead = [request.prompt for request in requests] if use_prompts else None
        with bank.use([request.adapter for request in requests], ahead):
            return answers(served, batch, args.tokens, **more)

    written = answer()
    same = [*map(list.__eq__, written, plain_peft.alone(model, folders, requests, tokenizer, args.tokens))]
    said = [" ".join(tokenizer.decode(tokens, skip_special_tokens=True).split()) for tokens in written]
    for tenant in dict.fromkeys(request.tenant for request in requests):
        first = next(text for text, request in zip(said, requests, strict=True) if request.tenant == tenant)
        print(f"   {tenant:<24}{first[:90]}")
    print(f"   the same tokens as that request alone in plain PEFT: {sum(same)} of {len(same)}")
    report["same_tokens"] = {"requests": len(same), "same": sum(same)}
    report["answers"] = [
        {"tenant": request.tenant, "text": request.text, "answer": text}
        for request, text in zip(requests, said, strict=True)
    ]

    print("3. Tokens per second, prompts left out (PEFT cannot mix them) and in", flush=True)
    fixed = {"min_new_tokens": args.tokens}  # every side writes as many
    sides: dict[str, Callable[[], Any]] = {
        "base alone": lambda: answers(model, batch, args.tokens, **fixed),
        "bank": lambda: answer(False, **fixed),
        "bank with prompts": lambda: answer(True, **fixed),
    }
    if any(request.adapter for request in requests):
        sides |= plain_peft.sides(model, folders, requests, tokenizer, args.tokens)
        pairs = zip(sides["bank"](), sides["PEFT, mixed"](), strict=True)
        report["same_tokens"]["peft_mixed"] = sum(ours == theirs for ours, theirs in pairs)
        print(f"   the bank writes what PEFT's mixed batch does: {report['same_tokens']['peft_mixed']} of {len(same)}")
    speeds = {name: len(requests) * args.tokens / s for name, s in race(sides, args.rounds).items()}
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"   {name:<24}{speed:>9.0f}{speed / speeds['base alone']:>9.2f} of the base alone")
    report["tokens_per_second"] = speeds

    print("4. Adapters: " + ", ".join(f"{entry.name} {entry.bytes / 1024:.0f} KiB" for entry in listed))
    report["bytes"] = {entry.name: entry.bytes for entry in listed}
    report["seconds"] = time.perf_counter() - began
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"   {report['seconds']:.0f} s on {report['device']}, {report['threads']} threads; all of it is in {args.out}/"
    )
    if not all(same) or report["same_tokens"].get("peft_mixed", len(same)) < len(same):
        sys.exit("some request was not answered as it is alone")


if __name__ == "__main__":
    main()
