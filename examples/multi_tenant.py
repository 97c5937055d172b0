"""One base model, one batch, every request its own tenant: a LoRA adapter of any rank, a soft prompt, both, neither.

    python examples/multi_tenant.py                                            # trains its tenants first
    python examples/multi_tenant.py --model DIR_OR_ID --adapters DIR [DIR …]   # your own, from PEFT's folders

It answers one mixed batch through `fastlora.AdapterBank`, checks each answer against plain PEFT with that adapter
alone, and counts tokens per second beside PEFT's own mixed batch and beside one tenant at a time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dialogues import Example, dialogues
from finetune import quiet_libraries
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from surroundings import surroundings
from tinybase import Size, make
from torch import Tensor
from training import row, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import fastlora


@dataclass(frozen=True)
class Task:
    """What a tenant has been trained to answer about a dialogue.   rank: of its LoRA adapter, 0 for a soft prompt."""

    name: str
    rank: int
    answer: Callable[[Example], str]


def _speakers(example: Example) -> list[str]:
    return list(dict.fromkeys(re.findall(r"^([^:\n]+):", example.dialogue, re.M)))


TASKS = (
    Task("summary", 16, lambda example: example.summary),
    Task("speakers", 4, lambda example: " and ".join(_speakers(example)) + "."),
    Task("last-line", 8, lambda example: example.dialogue.rsplit("\n", 1)[-1]),
    Task("first-word", 0, lambda example: f"{_speakers(example)[0]} speaks first."),
)
"""All of them read the same text: only the tenant says what is asked."""

VIRTUAL_TOKENS = 16


@dataclass(frozen=True)
class Request:
    """A text, and whose it is: an adapter, a soft prompt, both or neither."""

    text: str
    adapter: str | None = None
    prompt: str | None = None

    @property
    def tenant(self) -> str:
        return " + ".join(filter(None, (self.adapter, self.prompt))) or "base"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="answer one batch of requests, each with an adapter of its own")
    parser.add_argument("--model", help="a causal LM, directory or hub id (default: a small Llama)")
    parser.add_argument("--adapters", nargs="+", type=Path, metavar="DIR", help="PEFT folders (default: trained here)")
    parser.add_argument("--requests", type=Path, help="a text a line (default: generated dialogues)")
    parser.add_argument("--out", type=Path, default=Path("out/multi_tenant"), help="for adapters, report (%(default)s)")
    parser.add_argument(
        "--base", type=Path, default=Path("out/finetune/base"), help="of the default model (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="steps that train each tenant (default: 150)")
    parser.add_argument("--batch", type=int, default=16, help="requests in the batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few steps, to see that it all runs")
    args = parser.parse_args(argv)
    args.steps = args.steps or (3 if args.quick else 150)
    args.rounds = args.rounds or (2 if args.quick else 7)
    for folder in args.adapters or ():
        if not (folder / "adapter_config.json").exists():
            parser.error(f"--adapters: {folder} holds no adapter_config.json, wanted a folder that PEFT saved")
    return args


def text_of(example: Example) -> str:
    return f"{example.dialogue}\n\nAnswer:"


def base_of(args: argparse.Namespace, examples: Sequence[Example]) -> str:
    """Where the model lies; the default one is the fine-tune's, or a shorter-trained one made here."""
    if args.model:
        return str(args.model)
    if (args.base / "config.json").exists() and not args.quick:
        return str(args.base)
    path, size = str(args.out / "base"), Size(hidden=64, layers=2, heads=2, vocab=1000) if args.quick else Size()
    make(path, examples, size, steps=5 if args.quick else 300, limit=512, seed=args.seed, scratch=args.out / "trainer")
    return path


def train_tenants(path: str, examples: Sequence[Example], args: argparse.Namespace) -> dict[str, Path]:
    """An adapter or a soft prompt for each task, in PEFT's format, by name."""
    tokenizer, folders = AutoTokenizer.from_pretrained(path), {}
    for task in TASKS:
        set_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(path)
        if task.rank:
            config = LoraConfig(
                r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            model = get_peft_model(model, config)
            fastlora.patch(model)
        else:
            model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS))
        rows = [row(tokenizer, [(text_of(e), False), (f" {task.answer(e)}", True)], 512) for e in examples]
        losses = train(
            model, rows, pad=tokenizer.pad_token_id, steps=args.steps, batch=8, lr=4e-3 if task.rank else 3e-2,
            seed=args.seed, scratch=args.out / "trainer",
        )  # fmt: skip
        folders[task.name] = args.out / task.name
        model.save_pretrained(folders[task.name])
        kind = f"LoRA, rank {task.rank}" if task.rank else f"soft prompt, {VIRTUAL_TOKENS} tokens"
        tenth = max(1, len(losses) // 10)
        first, last = (statistics.mean(part) for part in (losses[:tenth], losses[-tenth:]))
        print(f"   {task.name:<12}{kind:<24}loss {first:.2f} → {last:.2f}", flush=True)
    return folders


def kinds(folders: dict[str, Path]) -> tuple[list[str], list[str]]:
    """The names of the LoRA adapters and of the soft prompts."""
    of = {name: str(PeftConfig.from_pretrained(folder).peft_type.value) for name, folder in folders.items()}
    return [n for n, kind in of.items() if kind == "LORA"], [n for n, kind in of.items() if kind == "PROMPT_TUNING"]


def mix(texts: Sequence[str], loras: Sequence[str], prompts: Sequence[str], count: int) -> list[Request]:
    """Requests of each tenant in turn: each adapter, each prompt, one with both, the base."""
    tenants = [(name, None) for name in loras] + [(None, name) for name in prompts] + [(None, None)]
    if loras and prompts:
        tenants.append((loras[0], prompts[0]))
    return [Request(text, *tenant) for text, tenant in zip(texts, itertools.cycle(tenants), strict=False)][:count]


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    tokens = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}


def answers(model: Any, batch: dict[str, Tensor], tokens: int, **more: Any) -> list[list[int]]:
    """Greedy new tokens of each row, up to its end."""
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, **more)
    end = model.generation_config.eos_token_id
    rows: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def alone(path: str, folders: dict[str, Path], request: Request, tokenizer: Any, tokens: int) -> list[int]:
    """The same request by itself in plain PEFT; it refuses LoRA with a prompt, so there the adapter is merged first."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    if request.adapter:
        model = PeftModel.from_pretrained(model, folders[request.adapter])
        model = model.merge_and_unload() if request.prompt else model
    if request.prompt:
        model = PeftModel.from_pretrained(model, folders[request.prompt])
    return answers(model.eval(), padded(tokenizer, [request.text], model.device), tokens)[0]


def race(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, interleaved, each going first in turn; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peft_sides(
    path: str, folders: dict[str, Path], requests: Sequence[Request], tokenizer: Any, tokens: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """PEFT's two ways to serve LoRA rows: its loop over adapters in one batch, and the tenants one after another."""
    names = [request.adapter for request in requests]
    loras = list(dict.fromkeys(filter(None, names)))
    base = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(base, folders[loras[0]], adapter_name=loras[0])
    for name in loras[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    model = model.to(device).eval()
    whole = padded(tokenizer, [request.text for request in requests], device)
    mine = {name: [r.text for r in requests if r.adapter == name] for name in dict.fromkeys(names)}
    batches = {name: padded(tokenizer, texts, device) for name, texts in mine.items()}

    def in_turn() -> None:
        for name, batch in batches.items():
            if name is None:
                with model.disable_adapter():
                    answers(model, batch, tokens, min_new_tokens=tokens)
            else:
                model.set_adapter(name)
                answers(model, batch, tokens, min_new_tokens=tokens)

    def mixed() -> None:
        answers(model, whole, tokens, min_new_tokens=tokens, adapter_names=[name or "__base__" for name in names])

    return {"PEFT, mixed": mixed, "one tenant at a time": in_turn}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet_libraries()
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    report |= surroundings(device.type)
    examples = list(itertools.islice(dialogues(args.seed), 60 if args.quick else 2000))
    training, held = examples[args.batch :], examples[: args.batch]
    path = base_of(args, training)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    print(f"1. The tenants of {path}", flush=True)
    folders = {folder.name: folder for folder in args.adapters} if args.adapters else None
    folders = folders or train_tenants(path, training, args)
    loras, prompts = kinds(folders)
    texts = args.requests.read_text("utf-8").splitlines() if args.requests else [text_of(e) for e in held]
    requests = mix(texts, loras, prompts, args.batch)

    print(f"2. One batch of {len(requests)} requests", flush=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    served = copy.deepcopy(model)
    bank = fastlora.AdapterBank(served, max_loras=max(len(loras), 1), max_prompts=max(len(prompts), 1))
    for name, folder in folders.items():
        bank.load_adapter(folder, name)
    batch = padded(tokenizer, [request.text for request in requests], device)

    def answer(use_prompts: bool = True, **more: Any) -> list[list[int]]:
        ahead = [request.prompt for request in requests] if use_prompts else None
        with bank.use([request.adapter for request in requests], ahead):
            return answers(served, batch, args.tokens, **more)

    written = answer()
    same = [
        tokens == alone(path, folders, request, tokenizer, args.tokens)
        for tokens, request in zip(written, requests, strict=True)
    ]
    shown: set[str] = set()
    for request, tokens in zip(requests, written, strict=True):
        if request.tenant not in shown:
            shown.add(request.tenant)
            text = " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())
            print(f"   {request.tenant:<24}{text[:90]}")
    print(f"   the same tokens as that request alone in plain PEFT: {sum(same)} of {len(same)}")
    report["same_tokens"] = {"requests": len(same), "same": sum(same)}

    print("3. Tokens per second, prompts left out (PEFT cannot mix them) and in", flush=True)
    fixed = {"min_new_tokens": args.tokens}  # every side writes as many
    sides: dict[str, Callable[[], object]] = {
        "base alone": lambda: answers(model, batch, args.tokens, **fixed),
        "bank": lambda: answer(False, **fixed),
        "bank with prompts": lambda: answer(True, **fixed),
    }
    if loras:
        sides |= peft_sides(path, folders, requests, tokenizer, args.tokens, device)
    speeds = {name: len(requests) * args.tokens / s for name, s in race(sides, args.rounds).items()}
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"   {name:<24}{speed:>9.0f}")
    report["tokens_per_second"] = speeds

    listed = bank.list_adapters()
    print("4. Adapters: " + ", ".join(f"{entry.name} {entry.bytes / 1024:.0f} KiB" for entry in listed))
    report["bytes"] = {entry.name: entry.bytes for entry in listed}
    report["seconds"] = time.perf_counter() - began
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"   {report['seconds']:.0f} s on {report['device']}, {report['threads']} threads; all of it is in {args.out}/"
    )
    if not all(same):
        sys.exit("some request was not answered as it is alone")


if __name__ == "__main__":
    main()
