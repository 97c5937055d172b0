"""Text to rows of tokens, with loss on some parts only, and the Hugging Face Trainer over them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

IGNORED = -100
"""The label of a position that carries no loss."""

Row = dict[str, list[int]]


def row(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]], limit: int) -> Row:
    """Token ids and labels of (text, learnt or only read) parts, and an end; beyond `limit` the beginning is lost."""
    ids: list[int] = []
    labels: list[int] = []
    for index, (text, learnt) in enumerate(parts):
        tokens = tokenizer(text, add_special_tokens=index == 0)["input_ids"]
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    end = tokenizer.eos_token_id
    return {"input_ids": [*ids, end][-limit:], "labels": [*labels, end][-limit:]}


def pair(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]], limit: int) -> Row:
    """The same for an encoder and its decoder: what is only read, then what is learnt and an end."""
    source, target = ("".join(text for text, learnt in parts if learnt == of) for of in (False, True))
    answer = tokenizer(target, add_special_tokens=False)["input_ids"]
    return {"input_ids": tokenizer(source)["input_ids"][-limit:], "labels": [*answer, tokenizer.eos_token_id][:limit]}


@dataclass(frozen=True)
class Collate:
    """Rows to a batch, padded on the right."""

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        def stack(key: str, fill: int) -> Tensor:
            width = max(len(r[key]) for r in rows)
            return torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in rows])

        ids = stack("input_ids", self.pad)
        lengths = torch.tensor([len(r["input_ids"]) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": stack("labels", IGNORED)}


class _Bar(ProgressCallback):
    """The Trainer's progress bar without a line for every step's log."""

    def on_log(self, *args: object, **kwargs: object) -> None:
        pass


class _Watch(TrainerCallback):
    """Calls a function with the number of the step that has ended, and the model."""

    def __init__(self, watch: Callable[[int, PreTrainedModel], None]) -> None:
        self.watch = watch

    def on_step_end(self, arguments: object, state: TrainerState, control: object, **more: Any) -> None:
        self.watch(state.global_step, more["model"])


def train(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    scratch: Path,
    watch: Callable[[int, PreTrainedModel], None] | None = None,
) -> list[float]:
    """Train what requires a gradient for `steps` steps; the loss of each.   watch: is called after each step."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        train_sampling_strategy="group_by_length",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, data_collator=Collate(pad), train_dataset=list(rows))
    trainer.remove_callback(PrinterCallback)
    if sys.stdout.isatty():
        trainer.add_callback(_Bar())
    if watch is not None:
        trainer.add_callback(_Watch(watch))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss over the first tenth of the steps and over the last."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
