"""Suite `step`: a whole training step of a small Llama through PEFT, its LoRA layers PEFT's own or patched.

And one token a sequence in evaluation, as a decode step is: there it is calls that cost, of a model whose weights push
Python's own code out of the caches between two layers.

The sides' models are copies of one, bit for bit: they differ in the class of the LoRA layers, or in whether adapters
are on. The frozen model runs without adapters, its backward from the loss down to the embeddings' output, as every
side's does. On a CPU nothing is flushed between two steps: what a side finds in the caches is what its own step and the
steps of the others left there, as in training.
The gate compares logits and gradients in evaluation mode, for masks differ from side to side; dropout is `linear`'s.
The loss is left out: one number, which may be right to any digit by chance. No fraction of the roof is given: nothing
here counts what attention, norms, the loss and the optimizer must compute and move.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model from config asks nobody

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tolerance import assert_all_close, relative_error
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from benchmarks.clock import Entry
from benchmarks.contest import Bench, Found, Subject, timed
from benchmarks.layers import FLOOR
from benchmarks.shapes import DTYPES, mix

DRAWS = 3
GATE_TOKENS = 256
"""To a sequence: in float64 attention keeps its whole matrix."""
RANK = 16


@dataclass(frozen=True)
class Size:
    hidden: int
    mlp: int
    layers: int
    heads: int
    vocab: int
    batch: int
    tokens: int


SIZES = {
    "tiny": (Size(32, 48, 1, 4, 64, 2, 8),),
    "cpu": (Size(256, 768, 4, 8, 2000, 4, 64), Size(512, 1536, 4, 8, 2000, 4, 128)),
    "gpu": (Size(2048, 8192, 4, 32, 32000, 4, 2048),),
}
RATES = {512: (0.0, 0.05)}
"""Dropout by hidden size, 0 and 0.1 for all others."""


@dataclass(frozen=True)
class Case:
    size: Size
    dtype: str
    adapter_dtype: str
    p: float

    @property
    def name(self) -> str:
        return self.of(self.size.tokens)

    def of(self, tokens: int) -> str:
        s = self.size
        dtypes = mix(self.dtype, self.adapter_dtype)
        return f"llama {s.layers}x{s.hidden} batch {s.batch}x{tokens} r{RANK} {dtypes} p{self.p:g}"


def cases(bench: Bench) -> list[Case]:
    mixes = {"tiny": (("fp32", "fp32"),), "gpu": (("bf16", "fp32"), ("bf16", "bf16"))}
    pairs = mixes.get(bench.set_name, (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")))
    sizes = SIZES[bench.set_name]
    return [Case(size, *pair, p) for size in sizes for pair in pairs for p in RATES.get(size.hidden, (0.0, 0.1))]


def _frozen(model: PeftModel) -> None:
    fastlora.unpatch(model)
    model.base_model.disable_adapter_layers()


def _peft(model: PeftModel) -> None:
    fastlora.unpatch(model)
    model.base_model.enable_adapter_layers()


def _fastlora(model: PeftModel) -> None:
    model.base_model.enable_adapter_layers()
    fastlora.patch(model, strict=True)


SIDES: dict[str, Callable[[PeftModel], None]] = {FLOOR: _frozen, "peft": _peft, "fastlora": _fastlora}


def measure(case: Case, bench: Bench) -> Found:
    """Gate fastlora's step against PEFT's and float64's, then race the sides."""
    model, found = _model(case, bench.machine.device), Found()
    sides = {impl: use for impl, use in SIDES.items() if impl in bench.impls}
    errors: dict[str, float | None] = dict.fromkeys(sides)
    for impl in [impl for impl in sides if impl != FLOOR]:
        try:
            errors[impl] = _gate(model, case, impl)
        except Exception as error:
            found.refuse(case.name, impl, error)
            del sides[impl]
    whole = _tokens(case, bench.machine.device)
    for tokens, entries in ((whole, _steps), (whole[:, :1], _decodes))[: 1 if case.p else 2]:
        name = case.of(tokens.shape[1])
        subject = Subject("step", name, tokens.numel(), 0, 0, RANK, case.dtype, case.adapter_dtype, case.p)
        timed(subject, {impl: partial(entries, impl, model, tokens) for impl in sides}, bench, found, errors)
    return found


def _steps(impl: str, model: PeftModel, tokens: Tensor) -> Iterator[Entry]:
    """On a model of its own: nobody is patched between two steps."""
    own = copy.deepcopy(model)
    step = _step(own, tokens)
    SIDES[impl](own)
    yield Entry(impl, "step", step, eager="AdamW counts its steps on the host")


def _decodes(impl: str, model: PeftModel, tokens: Tensor) -> Iterator[Entry]:
    own = copy.deepcopy(model).eval()
    SIDES[impl](own)

    def decode(_: object) -> Tensor:
        with torch.no_grad():
            logits: Tensor = own(input_ids=tokens).logits
        return logits

    yield Entry(impl, "decode", decode, eager="transformers decodes from the host")


def _model(case: Case, device: torch.device) -> PeftModel:
    s = case.size
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.heads // 2, max_position_embeddings=s.tokens,
        use_cache=False,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=case.p, target_modules="all-linear")
    with device:  # a CPU takes seconds to draw what a GPU's model has
        base = LlamaForCausalLM(config).to(device, DTYPES[case.dtype])
    model = get_peft_model(base, lora, autocast_adapter_dtype=case.adapter_dtype == "fp32")
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT's zeros would hide half of the gradients
            torch.nn.init.normal_(parameter, std=RANK**-0.5 / 10)
    return model


def _tokens(case: Case, device: torch.device) -> Tensor:
    return torch.randint(case.size.vocab, (case.size.batch, case.size.tokens), device=device)


def _step(model: PeftModel, tokens: Tensor) -> Callable[[object], None]:
    """Forward, backward and the optimizer, whose learning rate of zero leaves the model as it was."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def step(_: object) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gate(model: PeftModel, case: Case, impl: str) -> float:
    """The largest relative error among logits and gradients.   Raises AssertionError where the policy refuses them."""
    model.eval()
    _peft(model)
    exact_model = copy.deepcopy(model).double()
    draws = []
    for _ in range(DRAWS):
        tokens = _tokens(case, model.device)[:, :GATE_TOKENS]
        exact, plain = _results(exact_model, tokens), _results(model, tokens)
        SIDES[impl](model)
        draws.append((_results(model, tokens), plain, exact))
        _peft(model)
    assert_all_close(draws)
    return max(relative_error(actual[name], exact[name]) for actual, _, exact in draws for name in exact)


def _results(model: PeftModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        decoded = model(input_ids=tokens[:, :1]).logits
    return {"logits": out.logits.detach(), "decoded": decoded, **grads}
