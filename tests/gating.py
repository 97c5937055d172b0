"""Gated MLPs of small models: a family's, a user's own, and how often they ran as one op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import transformers
from models import VOCABULARY, lora_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora import functional

MLP = "base_model.model.model.layers.0.mlp"


def family(name: str, **options: Any) -> PeftModel:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=VOCABULARY, use_cache=False)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = getattr(transformers, f"{name}Config")(**ids, **sizes, **heads, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return get_peft_model(model, lora_config(target_modules="all-linear"))


class Mine(nn.Module):
    """A user's own module; `act` is any function of gate's output."""

    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)
        self.act = act

    def forward(self, hidden: Tensor, unused: Any = None) -> Tensor:
        opened = self.two(hidden)
        return self.three(opened.mul(self.act(self.one(hidden))))


def mine(act: Any = None, **options: Any) -> PeftModel:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mine(act or nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)

    options = {"target_modules": ["one", "two", "three"], "r": 2, "init_lora_weights": False, **options}
    return get_peft_model(Holder(), LoraConfig(**options)).double()


@contextmanager
def gated_calls() -> Iterator[mock.Mock]:
    """Count the calls of functional.lora_gated_mlp, which still run."""
    with mock.patch.object(functional, "lora_gated_mlp", wraps=functional.lora_gated_mlp) as calls:
        yield calls
