"""One soft prompt in a tiny model: beside PEFT's prompt tuning of a copy, and together with LoRA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import VOCABULARY, lora_config
from peft import get_peft_model
from tenants import CAUSAL, padded, rows_of, small, with_prompt
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear, SoftPrompt, add_soft_prompt

P = 5


def rows_for(model: Any, tokens: int = P) -> Tensor:
    weight = model.get_input_embeddings().weight
    return torch.randn(tokens, weight.shape[1], dtype=weight.dtype) * weight.std().detach()


def prompt_of(model: Any, rows: Tensor) -> SoftPrompt:
    seq2seq = model.config.is_encoder_decoder
    prompt = SoftPrompt(len(rows), model.get_input_embeddings(), encoder_decoder=seq2seq)
    prompt.weight.data.copy_(rows)
    return prompt


def pair(
    family: str, tokens: int = P, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Any, SoftPrompt, Any]:
    """(a model with our prompt, the prompt, PEFT's prompt tuning of a copy with the same)."""
    torch.manual_seed(seed)
    model = small(family).to(dtype)
    rows = rows_for(model, tokens)
    peft = with_prompt(copy.deepcopy(model), rows, family)
    return model, add_soft_prompt(model, prompt_of(model, rows)), peft


def batch(family: str, side: str = "right") -> dict[str, Tensor]:
    inputs = padded(rows_of(), side)
    labels = inputs["input_ids"] if family in CAUSAL else torch.randint(3, VOCABULARY, (5, 4))
    mask = inputs["attention_mask"] if family in CAUSAL else torch.ones_like(labels)
    return {**inputs, "labels": labels.masked_fill(mask == 0, -100)}


def in_peft(model: Any) -> Tensor:
    weight: Tensor = model.prompt_encoder["default"].embedding.weight
    return weight


def with_lora(family: str, how: str) -> tuple[Any, Any, SoftPrompt]:
    """(the model to call, the model of transformers in it, its prompt), with LoRA by PEFT, or LoRALinear."""
    hugging = small(family)
    rows = rows_for(hugging)
    if how == "modules":
        for name, linear in [(n, m) for n, m in hugging.named_modules() if n.endswith(("v_proj", "SelfAttention.v"))]:
            layer = LoRALinear.from_linear(linear, r=4)
            nn.init.normal_(layer.lora_B.weight, std=0.2)
            parent, _, last = name.rpartition(".")
            setattr(hugging.get_submodule(parent), last, layer)
        return hugging, hugging, add_soft_prompt(hugging, prompt_of(hugging, rows))
    if how == "prompt first":
        prompt = add_soft_prompt(hugging, prompt_of(hugging, rows))
        model = get_peft_model(hugging, lora_config(family))
        prompt.requires_grad_(True)
    else:
        model = get_peft_model(hugging, lora_config(family))
        prompt = add_soft_prompt(model, prompt_of(hugging, rows))
    assert len(fastlora.patch(model).patched) > 0
    return model, hugging, prompt
