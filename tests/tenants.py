"""Tiny models that serve soft prompts, and PEFT's prompt tuning of the same, a model for each prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models import VOCABULARY, base_model
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from fastlora.prompts import PromptOf, Prompts

LENGTHS = (1, 5, 20)
WHO = (1, 0, 20, 5, 0)
"""The batch's requests by the length of their prompt."""
BY_COLUMN = ("gpt_neo", "mpt", "bloom", "falcon")
"""Families that count distances in columns: a local window, or ALiBi."""
CAUSAL = ("llama", "qwen3", "gpt2", *BY_COLUMN)
FAMILIES = ("llama", "qwen3", "gpt2", "t5", "bart")


def small(family: str) -> transformers.PreTrainedModel:
    """A model of the family whose weights are large enough for its tokens to depend on what it reads."""
    if family == "bart":
        sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, dropout=0)
        ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
        config = transformers.BartConfig(vocab_size=VOCABULARY, **ids, **sizes, **heads)
        model = transformers.BartForConditionalGeneration(config).eval()
    elif family in BY_COLUMN:
        model = by_column(family).eval()
    else:
        model = base_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (family != "t5" or "EncDecAttention.o" in name):
                parameter.mul_(5)
    return model


def by_column(family: str) -> transformers.PreTrainedModel:
    ids = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=32)
    if family == "gpt_neo":
        local = dict(attention_types=[[["global", "local"], 1]], window_size=6, max_position_embeddings=64)
        return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**ids, **local, num_layers=2, num_heads=4))
    if family == "mpt":
        ids["d_model"] = ids.pop("hidden_size")
        return transformers.MptForCausalLM(transformers.MptConfig(**ids, n_layers=2, n_heads=4, max_seq_len=64))
    if family == "bloom":
        return transformers.BloomForCausalLM(transformers.BloomConfig(**ids, n_layer=2, n_head=4))
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, alibi=True)
    return transformers.FalconForCausalLM(transformers.FalconConfig(**ids, **sizes))


def with_prompt(base: nn.Module, rows: Tensor, family: str) -> nn.Module:
    """PEFT's prompt tuning around the base, with these virtual tokens."""
    task = "CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM"
    width = base.get_input_embeddings().weight.shape[1]
    sizes = dict(token_dim=width, num_layers=2, num_attention_heads=4)  # which PEFT does not find in every config
    model = get_peft_model(base, PromptTuningConfig(task_type=task, num_virtual_tokens=len(rows), **sizes))
    weight = model.prompt_encoder["default"].embedding.weight.data
    weight.normal_()  # a decoder's half, if there is one
    weight[: len(rows)] = rows
    return model.eval()


@dataclass
class Tenants:
    """A served model, its prompts by length, and for each length what PEFT would run: in fp32, and in float64."""

    family: str
    model: Any
    prompts: Prompts
    requests: dict[int, PromptOf | None]
    plain: dict[int, Any]
    exact: dict[int, Any]

    @classmethod
    def of(cls, family: str, seed: int = 0) -> Tenants:
        torch.manual_seed(seed)
        model = small(family)
        weight = model.get_input_embeddings().weight
        pool = {P: torch.randn(P, weight.shape[1]) * weight.std() for P in LENGTHS}
        plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        prompts = Prompts(model, max_prompts=4, max_tokens=32)
        requests: dict[int, PromptOf | None] = {0: None}
        for slot, (P, rows) in enumerate(pool.items()):
            requests[P] = PromptOf(slot, start=sum(LENGTHS[:slot]), tokens=P, version=(slot, 0))
            prompts.store(slot, sum(LENGTHS[:slot]), rows)
        peft = {P: with_prompt(plain, rows, family) for P, rows in pool.items()}
        doubled = {P: with_prompt(exact, rows.double(), family).double() for P, rows in pool.items()}
        return cls(family, model, prompts, requests, {0: plain, **peft}, {0: exact, **doubled})

    @property
    def causal(self) -> bool:
        return self.family in CAUSAL

    def serving(self, who: Sequence[int] = WHO) -> Any:
        return self.prompts.serving([self.requests[P] for P in who])

    def forward(self, who: Sequence[int], **inputs: Any) -> Any:
        with torch.no_grad(), self.serving(who):
            return self.model(**inputs)

    def generate(self, who: Sequence[int], **inputs: Any) -> Tensor:
        with self.serving(who):
            return self.model.generate(**inputs)


def rows_of(lengths: Sequence[int] = (5, 3, 7, 4, 6)) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (length,)) for length in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def one(row: Tensor) -> dict[str, Tensor]:
    return padded([row], "left")


def calls(model: nn.Module) -> list[int]:
    """Grows with each run of the model's body: True where that was a prefix's, whose tokens are all attended to."""
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"] is None), with_kwargs=True
    )
    return seen
