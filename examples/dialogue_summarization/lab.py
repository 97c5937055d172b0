"""One base and its data, and what one cell of the sweep finds out with them."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import beside
import measures
import torch
from dialogues import Example
from judge import Judge
from methods import Cell, attention_of, prepare
from plain_peft import padded
from surroundings import surroundings
from tasks import TASKS
from tinybase import reading
from torch import Tensor
from training import Collate, Row, pair, row, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

import fastlora

WATCHED = 64
"""Held-out dialogues whose loss is followed during training."""
POINTS = 8
"""How often."""


@dataclass(frozen=True)
class Schedule:
    """How each cell is trained.   lr: by what is trained."""

    steps: int
    batch: int
    lr: dict[str, float]
    limit: int


@dataclass(frozen=True)
class Data:
    """Dialogues to train on, held-out ones, and generated ones whose questions are the general task."""

    training: Sequence[Example]
    held: Sequence[Example]
    general: Sequence[Example]


class Lab:
    """A base on disk, under the name `model`, what it is asked, and how its answers are judged."""

    def __init__(self, model: str, path: str, data: Data, schedule: Schedule, attention: Sequence[str] | None) -> None:
        self.model, self.path, self.data, self.schedule = model, path, data, schedule
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.commit = surroundings(self.device)["commit"]
        self.seq2seq = bool(AutoConfig.from_pretrained(path).is_encoder_decoder)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.pad: int = self.tokenizer.pad_token_id
        self.attention = attention_of(self.open(), attention)

    def open(self) -> Any:
        """The base, fresh."""
        kind = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        return kind.from_pretrained(self.path, dtype="auto").to(self.device).eval()

    def row(self, prompt: str, answer: str, limit: int | None = None) -> Row:
        make = pair if self.seq2seq else row
        return make(self.tokenizer, [(prompt, False), (f" {answer}", True)], limit or self.schedule.limit)

    def rows(self, examples: Sequence[Example], task: str, shots: int = 0, seed: int = 0) -> list[Row]:
        """Prompts and answers.   shots: how many of the training dialogues, drawn anew each time, come before."""
        rng, limit = random.Random(seed), self.schedule.limit * (2 if shots else 1)
        rows = []
        for example in examples:
            before = "".join(
                f"{prompt} {answer}\n\n"
                for prompt, answer in (ask(e, task) for e in rng.sample(self.data.training, shots))
            )
            prompt, answer = ask(example, task)
            rows.append(self.row(before + prompt, answer, limit))
        return rows

    def judge(self, task: str, shots: int = 0, seed: int = 0) -> Judge:
        """Of the held-out dialogues."""
        references = [ask(example, task)[1] for example in self.data.held]
        return Judge(self.tokenizer, self.rows(self.data.held, task, shots, seed), references)

    @functools.cached_property
    def general(self) -> list[Row]:
        make = pair if self.seq2seq else row
        return [make(self.tokenizer, reading(example), self.schedule.limit) for example in self.data.general]

    def prompts(self, count: int) -> dict[str, Tensor]:
        """Of some held-out dialogues, as a batch to generate from."""
        texts = [example.prompt for example in self.data.held[:count]]
        return padded(self.tokenizer, texts, torch.device(self.device))

    @functools.cached_property
    def probe(self) -> dict[str, Tensor]:
        """A few held-out dialogues as one batch."""
        batch = Collate(self.pad)(self.rows(self.data.held[:4], "summary"))
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        logits: Tensor = model.eval()(**self.probe).logits
        return logits

    @functools.cached_property
    def base_logits(self) -> Tensor:
        return self.logits(self.open())

    def run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Train what the cell's method trains, save it in `folder`, and measure it."""
        set_seed(cell.seed)
        found: dict[str, Any] = {**vars(cell), "commit": self.commit}
        model, soft = prepare(self.open(), cell, self.attention)
        judge = self.judge(cell.task, cell.shots, cell.seed)
        trained = [p for p in model.parameters() if p.requires_grad] if cell.kind != "shots" else []
        everything = {id(p): p for p in model.parameters()}.values()
        found |= {"trainable": sum(p.numel() for p in trained), "total": sum(p.numel() for p in everything)}
        if trained:
            rows = self.rows(self.data.training, cell.task)
            weights = sum(p.numel() * p.element_size() for p in everything)
            found["peak"] = weights + self.peak(model, trained, rows)
            with clocked(found, "training"):
                found |= self.train(model, cell, rows, judge.rows[:WATCHED], folder / "trainer")
            found["file"] = save(model, soft, cell, folder)
        with clocked(found, "evaluation"):
            summaries = measures.written(judge, model)
            found |= measures.scores(judge, summaries)
            found["losses"] = measures.losses(model, judge.rows, self.pad)
            found["general"] = measures.losses(model, self.general, self.pad)
            found["exact"] = sum(map(str.__eq__, summaries, judge.references))
        found |= {"texts": summaries[:3], "references": judge.references[:3], "dialogue": self.data.held[0].dialogue}
        if soft is not None or "lora" in cell.kind:
            found["base_again"] = self.base_again(model, soft)
        found["load"] = os.getloadavg()[0]
        if cell.kind == "prompt" and soft is not None:
            near = soft.nearest_tokens(5, tokenizer=self.tokenizer)
            tensors = {key: value.tolist() for key, value in vars(near).items() if isinstance(value, Tensor)}
            found["neighbours"] = {**vars(near), **tensors}
        return found

    def train(
        self, model: Any, cell: Cell, rows: Sequence[Row], watched: Sequence[Row], scratch: Path
    ) -> dict[str, Any]:
        """The loss of each step, and now and then that of the watched rows."""
        schedule, curve = self.schedule, []

        def watch(step: int, model: Any) -> None:
            if step * POINTS // schedule.steps > (step - 1) * POINTS // schedule.steps:
                known = measures.losses(model, watched, self.pad)
                curve.append(
                    (step, round(sum(loss for loss, _, _ in known) / sum(tokens for _, tokens, _ in known), 4))
                )
                model.train()

        losses = train(
            model,
            rows,
            pad=self.pad,
            steps=schedule.steps,
            batch=schedule.batch,
            lr=schedule.lr[cell.kind],
            seed=cell.seed,
            scratch=scratch,
            watch=watch,
        )
        return {"steps": schedule.steps, "training_losses": [round(loss, 4) for loss in losses], "curve": curve}

    def peak(self, model: Any, trained: Sequence[Tensor], rows: Sequence[Row]) -> int:
        """What a first step of AdamW holds at most beyond the weights, on a long batch; the model stays as it was."""
        size = self.schedule.batch
        batches = [rows[start : start + size] for start in range(0, min(len(rows), 16 * size), size)]
        longest = max(batches, key=lambda batch: max(len(r["input_ids"]) for r in batch))
        batch = {key: value.to(self.device) for key, value in Collate(self.pad)(longest).items()}

        def step(batch: dict[str, Tensor]) -> None:
            optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
            model(**batch).loss.backward()
            optimizer.step()

        model.train()
        most = beside.peak(step, batch)
        model.zero_grad()
        return most

    def base_again(self, model: Any, soft: fastlora.SoftPrompt | None) -> bool:
        """Whether the model, its adapter and its prompt off, is the base to the bit."""
        if soft is not None:
            fastlora.set_soft_prompt(model, None)
        if not hasattr(model, "disable_adapter"):
            return torch.equal(self.logits(model), self.base_logits)
        with model.disable_adapter():
            return torch.equal(self.logits(model), self.base_logits)


def ask(example: Example, task: str) -> tuple[str, str]:
    """(prompt, answer) of a task: "summary", "topic", or "speakers" where no topics are known."""
    if task == "summary":
        return example.prompt, example.summary
    if task == "topic":
        return f"What is the following conversation about?\n\n{example.dialogue}\n\nTopic:", example.topic
    return f"Who speaks in the following conversation?\n\n{example.dialogue}\n\nSpeakers:", TASKS[1].answer(example)


def save(model: Any, soft: fastlora.SoftPrompt | None, cell: Cell, folder: Path) -> int:
    """Save what was trained.   Returns the bytes of its weights' files."""
    if cell.kind != "prompt":
        model.save_pretrained(folder / "model")
    if soft is not None:
        soft.save(folder / "prompt")
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@contextmanager
def clocked(found: dict[str, Any], what: str) -> Iterator[None]:
    """Seconds on the clock, and of the processor: the latter know nothing of other jobs."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found[f"{what}_seconds"] = round(time.perf_counter() - wall, 2)
    found[f"{what}_cpu_seconds"] = round(time.process_time() - cpu, 2)
