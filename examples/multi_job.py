"""Four fine-tuning jobs of different ranks on one frozen model and in one batch, beside the same four run in turn.

    python examples/multi_job.py                    # a small Llama, four questions about generated dialogues
    python examples/multi_job.py --model DIR_OR_ID

Each job has its own adapter, data, learning rate, optimizer and loss; one joins late, one finishes early. Each loss is
compared with that of the job alone in plain PEFT, in fp32 and in float64, and the step timed beside the four in turn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dialogues import dialogues
from finetune import given, quiet_libraries
from multi_tenant import LIMIT, base_of, race, whole
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from surroundings import surroundings
from tasks import TASKS, Task, text_of
from torch import Tensor, nn
from training import IGNORED, Collate, Row, row
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

import fastlora

CHANCE = 16.0
"""How many times PEFT's own fp32 error, against float64, a job's may be, as tests/tolerance.py allows one result at
the end of many layers, where one rounding grows by chance."""


@dataclass(frozen=True)
class Job:
    """One run.   task: what it learns, at which rank.   steps: of the common loop, those that it takes part in."""

    task: Task
    lr: float
    steps: range
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def options(self) -> dict[str, Any]:
        return {"r": self.task.rank, "lora_alpha": 2 * self.task.rank}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train four jobs in one batch, and the same four in turn")
    parser.add_argument("--model", help="a causal LM, directory or hub id (default: a small Llama)")
    parser.add_argument("--out", type=Path, default=Path("out/multi_job"), help="for adapters, report (%(default)s)")
    parser.add_argument("--base", type=Path, default=Path("out/finetune/base"), help="the small Llama (%(default)s)")
    parser.add_argument("--steps", type=whole, help="steps of the loop (default: 24)")
    parser.add_argument("--rows", type=whole, default=1, help="dialogues of a job in a step (default: %(default)s)")
    parser.add_argument("--rounds", type=whole, help="timed rounds (default: 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny base and few steps, to see that it all runs")
    args = parser.parse_args(argv)
    args.steps = args.steps or (8 if args.quick else 24)
    args.rounds = args.rounds or (2 if args.quick else 15)
    if args.steps < 4:
        parser.error(f"--steps: got {args.steps}, wanted 4 or more: one job joins after a quarter of them")
    return args


def plan(args: argparse.Namespace, tokenizer: Any, examples: Sequence[Any]) -> list[Job]:
    """The four: the third joins after a quarter of the steps, the second leaves after three."""
    n = args.steps
    spans = [range(n), range(n * 3 // 4), range(n // 4, n), range(n)]
    jobs = []
    for task, rank, lr, span in zip(TASKS, (32, 4, 8, 16), (1e-3, 3e-3, 2e-3, 1e-3), spans, strict=True):
        rows = [row(tokenizer, [(text_of(e), False), (f" {task.answer(e)}", True)], LIMIT) for e in examples]
        jobs.append(Job(replace(task, rank=rank), lr, span, rows))
    return jobs


def batch_of(job: Job, step: int, count: int) -> list[Row]:
    """The job's own data, in its own order: the step of the loop decides, whoever else is in it."""
    return [job.rows[(step * count + i) % len(job.rows)] for i in range(count)]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the job's own tokens that carry a loss."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def on(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.to(model.device) for key, t in batch.items()}


class Together:
    """All jobs in one batch."""

    def __init__(self, model: PreTrainedModel, collate: Collate) -> None:
        self.model, self.collate = model, collate
        self.jobs = fastlora.Jobs(model)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.left: dict[str, dict[str, Tensor]] = {}

    def join(self, job: Job, start: dict[str, Tensor], lr: float) -> None:
        self.jobs.add(job.name, **job.options)
        self.jobs.load_state_dict(job.name, start)
        self.optimizers[job.name] = torch.optim.AdamW(self.jobs.parameters(job.name), lr=lr)

    def leave(self, job: Job, folder: Path) -> None:
        self.jobs.save(job.name, folder)
        self.left[job.name] = self.jobs.state_dict(job.name)
        self.jobs.remove(job.name)
        del self.optimizers[job.name]

    def step(self, rows: dict[str, list[Row]]) -> dict[str, Tensor]:
        batch = on(self.model, self.collate([r for mine in rows.values() for r in mine]))
        counts = [len(mine) for mine in rows.values()]
        with self.jobs.use([name for name, count in zip(rows, counts, strict=True) for _ in range(count)]):
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            parts = zip(logits.split(counts), batch["labels"].split(counts), strict=True)
            losses = [loss_of(*part) for part in parts]
            torch.stack(losses).sum().backward()
        for name in rows:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return {name: loss.detach() for name, loss in zip(rows, losses, strict=True)}


class Alone:
    """One job in plain PEFT, on the base's own weights or a copy of them in another dtype."""

    def __init__(self, base: PreTrainedModel, job: Job, collate: Collate, dtype: torch.dtype = torch.float32) -> None:
        shared = {id(p): p for p in base.parameters()} if dtype == torch.float32 else {}
        config = LoraConfig(**job.options, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: PeftModel = get_peft_model(copy.deepcopy(base, shared), config).train()
        self.model.to(dtype)
        self.collate = collate
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def state(self) -> dict[str, Tensor]:
        return {key: t.detach().clone() for key, t in get_peft_model_state_dict(self.model).items()}

    def begin(self, lr: float) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)

    def step(self, rows: list[Row]) -> Tensor:
        batch = on(self.model, self.collate(rows))
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = loss_of(logits, batch["labels"])
        loss.backward()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


Losses = dict[tuple[str, int], float]


def in_one_batch(
    args: argparse.Namespace, base: PreTrainedModel, jobs: Sequence[Job], starts: dict[str, Any], collate: Collate
) -> tuple[Losses, dict[str, dict[str, Tensor]]]:
    """The common loop, with joins and leaves between steps.

    Returns the loss of every job at every step of its own, and what each had learnt when it left.
    """
    model, losses = copy.deepcopy(base), {}
    crew = Together(model.train(), collate)
    for step in range(args.steps):
        for job in jobs:
            if step == job.steps.start:
                crew.join(job, starts[job.name], job.lr)
        here = [job for job in jobs if step in job.steps]
        found = crew.step({job.name: batch_of(job, step, args.rows) for job in here})
        losses |= {(name, step): float(loss) for name, loss in found.items()}
        for job in here:
            if step == job.steps[-1]:
                crew.leave(job, args.out / job.name)
    return losses, crew.left


def in_turn(
    args: argparse.Namespace, base: PreTrainedModel, jobs: Sequence[Job], starts: dict[str, Any], collate: Collate,
    dtype: torch.dtype,
) -> Losses:  # fmt: skip
    """Job after job, each alone in plain PEFT from the same start."""
    losses: Losses = {}
    for job in jobs:
        alone = Alone(base, job, collate, dtype)
        with torch.no_grad():
            for key, p in alone.model.named_parameters():
                name = key.replace(".default.", ".")
                if name in starts[job.name]:
                    p.copy_(starts[job.name][name])
        alone.begin(job.lr)
        losses |= {(job.name, step): float(alone.step(batch_of(job, step, args.rows))) for step in job.steps}
    return losses


def error(found: Losses, exact: Losses) -> float:
    """Root mean square of the relative errors, no less than one rounding of fp32."""
    squares = [((found[key] - exact[key]) / exact[key]) ** 2 for key in exact]
    return max(math.sqrt(sum(squares) / len(squares)), torch.finfo(torch.float32).eps / 2)


def sides(
    args: argparse.Namespace, base: PreTrainedModel, jobs: Sequence[Job], starts: dict[str, Any], collate: Collate
) -> dict[str, Callable[[], Any]]:
    """A step of all four, in one batch and in turn; with learning rates of zero, so that the work stays the same."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    crew = Together(model.train(), collate)
    plain, patched = ([Alone(base, job, collate) for job in jobs] for _ in range(2))
    for job, ours in zip(jobs, patched, strict=True):
        crew.join(job, starts[job.name], 0.0)
        fastlora.patch(ours.model)
    for alone in (*plain, *patched):
        alone.begin(0.0)
    rows = {job.name: batch_of(job, job.steps.start, args.rows) for job in jobs}

    def each(models: list[Alone]) -> None:
        for alone, mine in zip(models, rows.values(), strict=True):
            alone.step(mine)

    return {
        "one batch": lambda: crew.step(rows),
        "in turn, PEFT": lambda: each(plain),
        "in turn, PEFT patched by fastlora": lambda: each(patched),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet_libraries()
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    report |= surroundings(device.type)
    examples = list(itertools.islice(dialogues(args.seed), 60 if args.quick else 2000))

    path = base_of(args, examples)
    with given("--model"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = Collate(tokenizer.pad_token_id)
    jobs = plan(args, tokenizer, examples[: 400 if not args.quick else 60])
    set_seed(args.seed)
    starts = {job.name: Alone(base, job, collate).state for job in jobs}

    print(f"1. {len(jobs)} jobs on {path}, {args.rows} dialogue(s) a step each", flush=True)
    together, left = in_one_batch(args, base, jobs, starts, collate)
    alone = in_turn(args, base, jobs, starts, collate, torch.float32)
    exact = in_turn(args, base, jobs, starts, collate, torch.float64)
    for job in jobs:
        first, last = (together[job.name, step] for step in (job.steps[0], job.steps[-1]))
        span = f"steps {job.steps.start}–{job.steps.stop - 1}"
        print(f"   {job.name:<12}rank {job.task.rank:<4}{span:<14}loss {first:.3f} → {last:.3f}")
    gap = max(abs(together[key] - alone[key]) / alone[key] for key in alone)
    ours, theirs = error(together, exact), error(alone, exact)
    report["losses"] = {
        f"{name} {step}": {"together": loss, "alone": alone[name, step], "float64": exact[name, step]}
        for (name, step), loss in together.items()
    }
    report["largest_difference"], report["error"] = gap, {"together": ours, "alone": theirs, "limit": CHANCE * theirs}
    print(f"   largest difference to the job alone in plain PEFT: {gap:.1e} of the loss, over {len(alone)} losses")
    print(f"   error against float64: {ours:.1e}; PEFT's own {theirs:.1e}, allowed {CHANCE * theirs:.1e}")

    loaded = {}
    for job in jobs:
        model = PeftModel.from_pretrained(copy.deepcopy(base), args.out / job.name)
        state = get_peft_model_state_dict(model)
        loaded[job.name] = all(torch.equal(state[key].cpu(), t) for key, t in left[job.name].items())
    print(f"   saved as PEFT's adapters, and loaded by plain PEFT to the bit: {sum(loaded.values())} of {len(loaded)}")

    print("2. A step of all four", flush=True)
    seconds = race(sides(args, base, jobs, starts, collate), args.rounds)
    for name, time_ in seconds.items():
        print(f"   {name:<36}{1e3 * time_:>8.1f} ms{time_ / seconds['one batch']:>8.2f}×")
    report["seconds"], report["rounds"] = seconds, args.rounds
    report["total_seconds"] = time.perf_counter() - began
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"   {report['total_seconds']:.0f} s on {report['device']}, {report['threads']} threads; all in {args.out}/")
    if not ours <= CHANCE * theirs or not all(loaded.values()):
        sys.exit("a job did not train as it does alone, or was not saved as PEFT's adapter")


if __name__ == "__main__":
    main()
