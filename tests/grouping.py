"""Groups of small models, by force and by family: who runs in one, and how often."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from models import VOCABULARY, base_model
from peft import LoraConfig, PeftModel, get_peft_model
from tolerance import assert_all_close
from torch import Tensor, nn

import fastlora
from fastlora import functional
from fastlora.peft import siblings

K = 16


class Three(nn.Module):
    """Layers named so that nothing can be guessed from it, called with one tensor; what lies between is overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.this, self.that, self.other = nn.Linear(K, K), nn.Linear(K, 24, bias=False), nn.Linear(K, K)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        first = self.this(x)
        x = self.between(x)
        return torch.cat((first, self.that(x), self.other(x)), -1)


def wrap(model: nn.Module, **options: Any) -> PeftModel:
    """An adapter with a random B on every linear layer."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**options))


@contextmanager
def group_calls() -> Iterator[mock.Mock]:
    """Count the calls of functional.lora_linear_group, which still run."""
    with mock.patch.object(functional, "lora_linear_group", wraps=functional.lora_linear_group) as calls:
        yield calls


def found(model: nn.Module, **options: Any) -> set[str]:
    """The groups that patch finds: the last parts of the members' names, each group once whatever its layer."""
    report = fastlora.patch(model, **options)
    assert report.ungrouped is None, report.ungrouped
    return {" ".join(name.split(".")[-1] for name in group) for group in report.groups}


def nothing_left() -> bool:
    return siblings._here.left is None and siblings._traced.left is None and siblings._here.callers == []


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, dx and every gradient of one forward and backward of a model of floats; none where there is none."""
    model.zero_grad()
    x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y, "dx": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


class Changing(Three):
    """Does between its siblings what a test tells it to, once it is patched."""

    what: Callable[[nn.Module, Tensor], Tensor | None] = staticmethod(lambda model, x: None)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1  # as of a layer before, so that it may change in place
        first = self.this(x)
        changed = self.what(self, x)
        x = x if changed is None else changed
        return torch.cat((first, self.that(x), self.other(x)), -1)


def pair(**options: Any) -> tuple[Any, Any]:
    """(PEFT's, ours), the same numbers."""
    model = wrap(Changing(), **options)
    ours = copy.deepcopy(model)
    assert [len(group) for group in fastlora.patch(ours).groups] == [3]
    return model, ours


def tell(models: tuple[Any, Any], what: Callable[[Any, Tensor], Any]) -> None:
    for model in models:
        model.base_model.model.what = what


def assert_right(models: tuple[Any, Any], run: Callable[[nn.Module, Tensor], dict[str, Tensor]] = outcome) -> int:
    """As near to float64 as PEFT, on six inputs; nothing is left.   Returns the groups that ours ran on one input."""
    model, ours = models
    draws, exact = [], copy.deepcopy(model).double()
    for _ in range(6):
        x = torch.randn(5, K)
        with group_calls() as calls:
            actual = {name: value.clone() for name, value in run(ours, x).items()}
        assert nothing_left()
        draws.append((actual, {name: v.clone() for name, v in run(model, x).items()}, run(exact, x)))
    assert_all_close(draws)
    return int(calls.call_count)


def shift(model: Any, x: Tensor) -> Tensor:
    return x + 1


def alias(model: Any, x: Tensor) -> Tensor:
    return x.view_as(x)


def in_place(model: Any, x: Tensor) -> None:
    x.mul_(3)


def through_a_view(model: Any, x: Tensor) -> None:
    x[1:].zero_()


def call_one_alone(model: Any, x: Tensor) -> None:
    model.that(x + 2)


IDS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
QKV, MLP = "q_proj k_proj v_proj", "gate_proj up_proj"


def gated_t5() -> nn.Module:
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**IDS, **sizes, decoder_start_token_id=0))


def causal(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**IDS, **SIZES, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


STRUCTURES = {
    "llama": (lambda: base_model("llama"), {QKV, MLP}, 4),
    "qwen3": (lambda: base_model("qwen3"), {QKV, MLP}, 4),
    "gpt2": (lambda: base_model("gpt2"), set(), 0),  # c_attn is fused already
    "mistral": (lambda: causal("Mistral", num_key_value_heads=1), {QKV, MLP}, 4),
    "gemma": (lambda: causal("Gemma", head_dim=16, num_key_value_heads=1), {QKV, MLP}, 4),
    "phi3": (lambda: causal("Phi3", num_key_value_heads=1), set(), 0),  # qkv_proj and gate_up_proj
    "phi": (lambda: causal("Phi"), {QKV}, 2),
    "t5": (gated_t5, {"q k v", "k v", "wi_0 wi_1"}, 2 * (2 + 3)),  # k v of the cross-attention, whose q has another x
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**IDS, **SIZES)), {"query key value"}, 2),
}
"""By family: what builds it, the kinds of group in it, and how many groups."""
