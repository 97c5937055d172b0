"""Text to rows of tokens, with loss on some parts only, and the Hugging Face Trainer over them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
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


@dataclass(frozen=True)
class Collate:
    """Rows to a batch, padded on the right."""

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(r["input_ids"]) for r in rows)

        def stack(key: str, fill: int) -> Tensor:
            return torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in rows])

        ids = stack("input_ids", self.pad)
        lengths = torch.tensor([len(r["input_ids"]) for r in rows])
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": stack("labels", IGNORED)}


class _Bar(ProgressCallback):
    """The Trainer's progress bar without a line for every step's log."""

    def on_log(self, *args: object, **kwargs: object) -> None:
        pass


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
) -> list[float]:
    """Train what requires a gradient for `steps` steps; the loss of each."""
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
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
