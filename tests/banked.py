"""Tenants of a bank: PEFT adapters on copies of one base model, and what each of them computes alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from models import logits, lora_config
from peft import PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from fastlora import AdapterBank

RANKS = (1, 4, 7, 16, 64)


def tenant(base: nn.Module, family: str = "llama", **options: Any) -> PeftModel:
    """PEFT's adapter on a copy of the base, with a B (and a lora_bias) that is not zero."""
    model = get_peft_model(copy.deepcopy(base), lora_config(family, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def prompter(base: nn.Module, tokens: int, task: str = "CAUSAL_LM") -> PeftModel:
    """PEFT's prompt tuning on a copy of the base."""
    model = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type=task, num_virtual_tokens=tokens)).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.5)
    return model


def state_of(model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, config) as PEFT would save them."""
    state = {key: t.detach().clone() for key, t in get_peft_model_state_dict(model).items()}
    return state, model.peft_config["default"].to_dict()


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def take(bank: AdapterBank, name: str, model: PeftModel, **options: Any) -> int:
    """Load a tenant's adapter into the bank."""
    state, config = state_of(model)
    return bank.load_adapter(state, name, config=config, **options)


def rows(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One request of a batch, alone."""
    return {key: t[row : row + 1] for key, t in inputs.items()}


def names(mapping: list[int | None]) -> list[str | None]:
    return [None if r is None else f"r{RANKS[r]}" for r in mapping]


def tenants_of(base: nn.Module, family: str) -> dict[str | None, nn.Module]:
    """By name, r1 to r64 with their ranks and other scalings, and the base as None."""
    made: dict[str | None, nn.Module] = {None: base}
    for r in RANKS:
        made[f"r{r}"] = tenant(base, family, r=r, lora_alpha=max(1, r // 2))
    return made


def bank_with(models: dict[str | None, nn.Module], **options: Any) -> AdapterBank:
    bank = AdapterBank(copy.deepcopy(models[None]), **options)
    for name, model in models.items():
        if name is not None:
            take(bank, name, model)
    return bank


def model_of(bank: AdapterBank) -> Any:
    return bank._attached.model


def bank_of(base: nn.Module, **options: Any) -> AdapterBank:
    return AdapterBank(copy.deepcopy(base), **{"max_loras": 4, "max_total_rank": 16, **options})


def output(bank: AdapterBank, *names: str | None) -> Tensor:
    inputs = {"input_ids": torch.arange(3, 3 + 5 * len(names)).view(len(names), 5)}
    with bank.use(names):
        return logits(bank._attached.model, inputs)
