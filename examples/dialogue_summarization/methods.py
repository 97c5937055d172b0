"""The cells of the sweep: what each trains of the base, and how a model is prepared for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model

import fastlora
from fastlora.plan import targeted

RANKS = (4, 8, 16, 32, 64)
VIRTUAL_TOKENS = (20, 50, 100)
DROPOUT = 0.05
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q", "k", "v", "o"),
    ("c_attn",),
    ("query_key_value",),
)
"""What the linear layers of attention are called, family by family."""


@dataclass(frozen=True)
class Cell:
    """One run of one method.

    row: the method's name.   kind: "shots", "full", "lora", "prompt" or "lora+prompt".   model: whose base.   r: rank.
      targets: "attention" or "all-linear".   tokens: virtual ones.   shots: examples in the prompt.
    """

    row: str
    kind: str
    model: str
    seed: int = 0
    r: int = 0
    targets: str = ""
    tokens: int = 0
    shots: int = 0
    task: str = "summary"

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.model}-{self.row}-{self.seed}".replace(" ", "-")


def lora(r: int, targets: str, model: str, seed: int = 0) -> Cell:
    short = {"attention": "attention", "all-linear": "all"}[targets]
    return Cell(f"lora {short} {r}", "lora", model, seed, r=r, targets=targets)


def prompt(tokens: int, model: str, seed: int = 0) -> Cell:
    return Cell(f"prompt {tokens}", "prompt", model, seed, tokens=tokens)


def sweep(model: str, seeds: int, second: str) -> list[Cell]:
    """Every method on one base, and an adapter for the second task; the headline rows with several seeds."""
    drawn = range(seeds)
    cells = [Cell("zero-shot", "shots", model)]
    for shots, row in ((1, "one-shot"), (3, "few-shot")):
        cells += [Cell(row, "shots", model, seed, shots=shots) for seed in drawn]
    cells += [Cell("full", "full", model, seed) for seed in drawn]
    for targets in ("all-linear", "attention"):
        for r in RANKS:
            cells += [lora(r, targets, model, seed) for seed in (drawn if (r, targets) == (16, "all-linear") else (0,))]
    for tokens in VIRTUAL_TOKENS:
        cells += [prompt(tokens, model, seed) for seed in (drawn if tokens == 50 else (0,))]
    cells.append(Cell("lora all 16 + prompt 20", "lora+prompt", model, r=16, targets="all-linear", tokens=20))
    cells.append(Cell(second, "lora", model, r=16, targets="all-linear", task=second))
    return cells


def short_sweep(model: str, seeds: int) -> list[Cell]:
    """The base, full fine-tuning, LoRA 16 and prompt 50."""
    cells = [Cell("zero-shot", "shots", model)]
    for seed in range(seeds):
        cells += [Cell("full", "full", model, seed), lora(16, "all-linear", model, seed), prompt(50, model, seed)]
    return sorted(cells, key=lambda cell: [c.row for c in cells].index(cell.row))


def attention_of(model: Any, names: Sequence[str] | None = None) -> list[str]:
    """The names of the model's attention layers.   Raises ValueError for a model without, or without those given."""
    if names:
        targeted(model, names)
        return list(names)
    for family in ATTENTION:
        try:
            targeted(model, family)
            return list(family)
        except ValueError as error:
            said = error
    raise ValueError(f"{said}; name its attention layers with --attention")


def prepare(model: Any, cell: Cell, attention: Sequence[str]) -> tuple[Any, fastlora.SoftPrompt | None]:
    """The model in which only what the cell's method trains has gradients, and its soft prompt."""
    if "lora" in cell.kind:
        config = LoraConfig(
            r=cell.r,
            lora_alpha=2 * cell.r,
            lora_dropout=DROPOUT,
            target_modules=list(attention) if cell.targets == "attention" else cell.targets,
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        fastlora.patch(model, strict=True)
    soft = fastlora.add_soft_prompt(model, cell.tokens, init="vocab") if cell.tokens else None
    return model, soft
