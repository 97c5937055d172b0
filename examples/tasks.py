"""Tenants of one base: what each answers about a dialogue, and its LoRA adapter or soft prompt, trained here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dialogues import Example
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from training import ends, row, train
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

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
    Task("first-fact", 0, lambda example: example.asks[0][1]),
)
"""All of them read the same text: only the tenant says what is asked. The soft prompt asks what the base has learnt."""

VIRTUAL_TOKENS = 16


def text_of(example: Example) -> str:
    return f"{example.dialogue}\n\nAnswer:"


def train_tenants(
    path: str, examples: Sequence[Example], out: Path, *, steps: int, limit: int, seed: int
) -> dict[str, Path]:
    """An adapter or a soft prompt of the model at `path` for each task, in PEFT's format under `out`, by name."""
    tokenizer, folders = AutoTokenizer.from_pretrained(path), {}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for task in TASKS:
        set_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(path)
        if task.rank:
            alpha = 2 * task.rank
            config = LoraConfig(r=task.rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
            fastlora.patch(model)
        else:
            model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS))
        rows = [row(tokenizer, [(text_of(e), False), (f" {task.answer(e)}", True)], limit) for e in examples]
        lr = 4e-3 if task.rank else 0.3
        losses = train(
            model, rows, pad=tokenizer.pad_token_id, steps=steps, batch=8, lr=lr, seed=seed, scratch=out / "trainer"
        )
        folders[task.name] = out / task.name
        model.save_pretrained(folders[task.name])
        kind = f"LoRA, rank {task.rank}" if task.rank else f"soft prompt, {VIRTUAL_TOKENS} tokens"
        first, last = ends(losses)
        print(f"   {task.name:<12}{kind:<24}loss {first:.2f} → {last:.2f}", flush=True)
    return folders
