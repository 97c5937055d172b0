"""Tiny Hugging Face models from config, PEFT's adapters on them, and what one training step of them computes."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tolerance import assert_all_close
from torch import Tensor, nn

import fastlora
from fastlora import functional

torch.set_num_threads(1)  # for models this small, threads only wait for each other

Run = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
FAMILIES = ("llama", "qwen3", "t5", "gpt2")
VOCABULARY = 64
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "t5": ["q", "v", "wi", "wo"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def base_model(family: str = "llama", layers: int = 2) -> transformers.PreTrainedModel:
    """A small model of the family with fresh weights, in evaluation mode, its own dropout off and no cache."""
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=VOCABULARY, use_cache=False)
    if family == "gpt2":
        sizes = dict(n_embd=64, n_layer=layers, n_head=4, n_positions=64)
        no_dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**ids, **sizes, **no_dropout))
    elif family == "t5":
        sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=layers, num_heads=4)
        options = dict(dropout_rate=0, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **sizes, **options))
    else:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, max_position_embeddings=64)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        if family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ids, **sizes, **heads))
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**ids, **sizes, **heads))
    model.loss_type = "ForCausalLM"  # GPT-2 has none, and logs so, which no whole graph survives
    return model.eval()


def lora_config(family: str = "llama", **options: Any) -> LoraConfig:
    """Rank 4 on every linear kind of the family, with a random B, so that the update is seen."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "init_lora_weights": False, **options}
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    return LoraConfig(task_type=task, fan_in_fan_out=family == "gpt2", **options)


def peft_model(family: str = "llama", layers: int = 2, **options: Any) -> PeftModel:
    """`base_model` with one adapter, "default"."""
    return get_peft_model(base_model(family, layers), lora_config(family, **options))


def batch(family: str = "llama", rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length))
    labels = ids if family != "t5" else torch.randint(3, VOCABULARY, (rows, length - 2))
    return {"input_ids": ids, "labels": labels}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def step(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Logits, loss and every gradient of one forward and backward."""
    model.zero_grad()
    out = model(**inputs, **kwargs)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits, "loss": out.loss, **grads}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    out: Tensor = model(**inputs, **kwargs).logits
    return out


@dataclass
class Calls:
    """How often each functional op has run since `counted` began."""

    linear: mock.Mock
    update: mock.Mock

    def __eq__(self, other: object) -> bool:
        return (self.linear.call_count, self.update.call_count) == other

    def __repr__(self) -> str:
        return f"{self.linear.call_count} × lora_linear, {self.update.call_count} × lora_update"


@contextmanager
def counted() -> Iterator[Calls]:
    """Count the calls of functional.lora_linear and lora_update, which still run; a CPU's layers, which are let past
    lora_linear's checks, too."""
    unchecked = functional.lora_linear_on_torch

    def on_torch(*inputs: Any) -> Tensor:
        linear.call_count += 1
        return unchecked(*inputs)

    with (
        mock.patch.object(functional, "lora_linear", wraps=functional.lora_linear) as linear,
        mock.patch.object(functional, "lora_linear_on_torch", on_torch),
        mock.patch.object(functional, "lora_update", wraps=functional.lora_update) as update,
    ):
        yield Calls(linear, update)


def copies(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(a patched copy, a float64 copy) of an unpatched PEFT model."""
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    return ours, copy.deepcopy(model).double()


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_parity(build: Callable[[], nn.Module], run: Run, family: str = "llama", draws: int = 3) -> None:
    """Patched copies of freshly drawn models compute what PEFT computes, by the tolerance policy for whole models.

    build() -> an unpatched PEFT model.   run(model, inputs) -> {name: tensor}.   Exact is PEFT's, in float64.
    """
    results = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model, inputs = build(), batch(family)
        ours, exact = copies(model)
        results.append((run(ours, inputs), run(model, inputs), run(exact, inputs)))
    assert_all_close(results)
