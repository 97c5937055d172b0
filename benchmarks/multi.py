"""Suite `multi`: a batch whose requests have adapters of their own, decode (one token each) and prefill.

A whole small Llama, as every side serves it: the base alone, PEFT's loop over adapters, a gather of each row's factors
at the largest rank (as vLLM's kernels read them), and the bank. Adapters are drawn to requests identically, uniformly,
by Zipf's law with exponent 1.5, or each its own; some requests may be the base's. All sides read the same base weights
one after another and nothing is flushed on a CPU, so what fits in its caches is warm.

The roof is drawn over the linear layers, the head and the adapters in the batch, each read once; attention, norms and
the embedding are left out, so the fraction is a lower bound.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model from config asks nobody

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tolerance import assert_all_close, relative_error
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.clock import Entry
from benchmarks.contest import Bench, Found, Subject, timed
from benchmarks.layers import FLOOR
from benchmarks.shapes import DTYPES
from fastlora import AdapterBank
from fastlora_kernels.traffic import JobsLayer, Layer, Work

DRAWS = 3
MOST_OF_PEFT = 64
"""Adapters of PEFT's that are worth loading: it makes two modules of each in every layer."""

EAGER = {"peft": "it picks each adapter's rows by Python lists, a copy to the GPU that no graph holds"}
"""Whom no CUDA graph can hold, and why."""

UNMASKED = "sdpa by a flag"
"""transformers' own attention, for which it makes no mask: while a graph is captured it takes any batch for a packed
one, and some twenty small launches would go into each side's step, and into what a ratio is taken over."""
AttentionInterface.register(UNMASKED, sdpa_attention_forward)

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TARGETS = {"qv": ("self_attn.q_proj", "self_attn.v_proj"), "all": LAYERS}
"""What an adapter adapts: PEFT's default for a Llama, or all linear layers."""


@dataclass(frozen=True)
class Size:
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    requests: int
    prefill: int


SIZES = {
    "tiny": Size(32, 48, 1, 4, 2, 64, 4, 3),
    "cpu": Size(512, 1376, 4, 8, 8, 32000, 32, 16),
    "gpu": Size(4096, 14336, 2, 32, 8, 2000, 64, 128),
}


@dataclass(frozen=True)
class Case:
    """spread: "identical", "uniform", "zipf" or "distinct".   base: each so-many-th request has none; 0 for no such."""

    size: Size
    dtype: str
    tokens: int
    adapters: int
    ranks: tuple[int, ...] = (16,)
    spread: str = "distinct"
    base: int = 0
    target: str = "all"

    @property
    def name(self) -> str:
        s, ranks = self.size, "/".join(map(str, self.ranks))
        rows = f" 1 in {self.base} base" if self.base else ""
        load = f"batch {s.requests}x{self.tokens} {self.spread} {self.adapters}"
        return f"llama {s.layers}x{s.hidden} {load} r{ranks} {self.target}{rows}"

    def slots(self) -> list[int]:
        """Which adapter each request has, −1 for none; the same each time."""
        draw = torch.Generator().manual_seed(7)
        G, B = self.adapters, self.size.requests
        chance = torch.arange(1, G + 1, dtype=torch.float64) ** (-1.5 if self.spread == "zipf" else 0.0)
        match self.spread:
            case "identical":
                found = [0] * B
            case "distinct":
                found = [i % G for i in range(B)]
            case _:
                found = torch.multinomial(chance, B, replacement=True, generator=draw).tolist()
        return [-1 if self.base and i % self.base == 0 else slot for i, slot in enumerate(found)]


Run = Callable[[Tensor], Tensor]
States = list[tuple[dict[str, Any], dict[str, Tensor]]]


def cases(bench: Bench) -> list[Case]:
    size = SIZES[bench.set_name]
    B, T, dtype = size.requests, size.prefill, "bf16" if bench.set_name == "gpu" else "fp32"
    if bench.set_name == "tiny":
        return [Case(size, dtype, T, 3, (2, 4), "distinct", 3)]
    found = [Case(size, dtype, 1, B), Case(size, dtype, 1, 1, spread="identical")]  # a budget may end after these
    found += [Case(size, dtype, T, B), Case(size, dtype, T, 1, spread="identical")]
    found += [Case(size, dtype, tokens, B, target="qv") for tokens in (1, T)]
    found += [Case(size, dtype, 1, B, (8, 16, 32, 64)), Case(size, dtype, 1, B, base=2)]
    found += [Case(size, dtype, 1, G, spread="uniform") for G in (2, 8, 128, 512)]
    found += [Case(size, dtype, tokens, 64, spread="zipf") for tokens in (1, T)]
    found += [Case(size, dtype, 1, B, (r,)) for r in (4, 64)]
    return found if bench.set_name == "cpu" else [*found, Case(size, dtype, 1, 1024, spread="uniform")]


def measure(case: Case, bench: Bench) -> Found:
    """Gate every side against float64 by PEFT's own formulation, then race them."""
    device = bench.machine.device
    model = _model(case, device)
    tokens = torch.randint(case.size.vocab, (DRAWS, case.size.requests, case.tokens), device=device)
    states = [_state(case, index, device) for index in range(case.adapters)]
    found, sides = Found(), {}
    errors: dict[str, float | None] = {FLOOR: None}
    exact, plain = (_plain(model, states, case, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
    wanted = [(exact(t), plain(t)) for t in tokens]
    for impl, make in _makers(case, bench).items():
        try:
            run = make(model, states, case)
            if impl != FLOOR:
                errors[impl] = _error([run(t) for t in tokens], wanted)
            sides[impl] = run
        except Exception as error:
            found.refuse(case.name, impl, error)
    M, R = case.size.requests * case.tokens, max(case.ranks)
    subject = Subject("multi", case.name, M, 0, 0, R, case.dtype, case.dtype, 0.0, case.adapters)
    entries = {impl: partial(_entries, impl, run, tokens[0]) for impl, run in sides.items()}
    timed(subject, entries, bench, found, errors, lambda impl, _: work(case, impl))
    return found


def _error(results: list[Tensor], wanted: list[tuple[Tensor, Tensor]]) -> float:
    """wanted: (float64's, plain torch's) of each.   Raises AssertionError where the tolerance policy refuses them."""
    assert_all_close([({"logits": y}, {"logits": p}, {"logits": e}) for y, (e, p) in zip(results, wanted, strict=True)])
    return max(relative_error(y, e) for y, (e, _) in zip(results, wanted, strict=True))


def _entries(impl: str, run: Run, tokens: Tensor) -> Iterator[Entry]:
    yield Entry(impl, "forward", lambda _: run(tokens), eager=EAGER.get(impl, ""))


def work(case: Case, impl: str) -> Work:
    """Of the linear layers and the head; of the adapters only those that some request has."""
    s, size = case.size, DTYPES[case.dtype].itemsize
    M, total = s.requests * case.tokens, Work()
    requests = Counter(case.slots())
    none = requests.pop(-1, 0) * case.tokens
    rows = tuple(count * case.tokens for count in requests.values())
    ranks = tuple(case.ranks[slot % len(case.ranks)] for slot in requests)
    for name, (K, N) in _shapes(s).items():
        if impl == FLOOR or name not in TARGETS[case.target]:
            total += Layer(M, K, N, 1, size).frozen("forward")
        else:
            total += JobsLayer(rows, ranks, K, N, none, size, size).lora("forward")
    layers = Work(total.flops * s.layers, total.bytes * s.layers)
    return layers + Layer(M, s.hidden, s.vocab, 1, size).frozen("forward")


def _shapes(s: Size) -> dict[str, tuple[int, int]]:
    """(K, N) of each linear of a decoder layer."""
    kv = s.hidden // s.heads * s.kv_heads
    outs = dict(zip(LAYERS, (s.hidden, kv, kv, s.hidden, s.mlp, s.mlp, s.hidden), strict=True))
    return {name: (s.mlp if "down" in name else s.hidden, N) for name, N in outs.items()}


def _makers(case: Case, bench: Bench) -> dict[str, Callable[..., Run]]:
    makers: dict[str, Callable[..., Run]] = {FLOOR: _frozen, "peft": _peft, "vllm-style": _gathered, "fastlora": _bank}
    if case.adapters > MOST_OF_PEFT:
        del makers["peft"]
    return {name: make for name, make in makers.items() if name in bench.impls}


def _model(case: Case, device: torch.device) -> LlamaForCausalLM:
    s = case.size
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, use_cache=False,
        attn_implementation=UNMASKED,
    )  # fmt: skip
    with device:  # a CPU takes seconds to draw what a GPU's model has
        return LlamaForCausalLM(config).to(device, DTYPES[case.dtype]).eval().requires_grad_(False)


def _twin(model: nn.Module) -> Any:
    """The model again over the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _state(case: Case, index: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter as PEFT saves it: (config, state dict)."""
    s, R = case.size, case.ranks[index % len(case.ranks)]
    wanted = TARGETS[case.target]
    suffixes = [name.rpartition(".")[2] for name in wanted]
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=suffixes, task_type="CAUSAL_LM")
    state = {}
    for layer in range(s.layers):
        for name in wanted:
            K, N = _shapes(s)[name]
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("lora_A", (R, K)), ("lora_B", (N, R))):
                factor = torch.randn(shape, device=device) * shape[1] ** -0.5 * (1 if part == "lora_A" else 0.3)
                state[f"{prefix}.{part}.weight"] = factor.to(DTYPES[case.dtype])
    return config, state


def _names(case: Case) -> list[str]:
    return ["__base__" if slot < 0 else f"a{slot}" for slot in case.slots()]


def _run(model: Any, **more: Any) -> Run:
    @torch.no_grad()
    def run(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens, **more).logits
        return logits

    return run


def _frozen(model: nn.Module, states: States, case: Case) -> Run:
    return _run(model)


def _peft(model: nn.Module, states: States, case: Case) -> Run:
    wrapped = None
    for index, (config, state) in enumerate(states):
        name = f"a{index}"
        if wrapped is None:
            wrapped = get_peft_model(_twin(model), config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(wrapped, state, adapter_name=name)
    assert wrapped is not None
    return _run(wrapped.eval(), adapter_names=_names(case))


def _bank(model: nn.Module, states: States, case: Case) -> Run:
    served = _twin(model)
    rows = sum(config.r for config, _ in states)
    bank = AdapterBank(served, max_loras=len(states), max_total_rank=rows, max_prompts=1, max_prompt_tokens=1)
    for index, (config, state) in enumerate(states):
        bank.load_adapter(state, f"a{index}", config=config)
    run, names = _run(served), _names(case)
    slots = [-1 if slot < 0 else bank.slot(f"a{slot}") for slot in case.slots()]
    mapping = torch.tensor(slots, dtype=torch.int32, device=model.device).repeat_interleave(case.tokens)

    def use(tokens: Tensor) -> Tensor:
        with bank.use(adapter_names=names):
            return run(tokens)

    return _replayed(bank, mapping, run) if model.device.type == "cuda" else use


def _replayed(bank: AdapterBank, mapping: Tensor, run: Run) -> Run:
    """By the mapping, as an engine does whose steps are a captured graph: what routes the rows is part of it.

    The mapping stands from call to call, for to take it back is a routing more, of no row.
    """

    def replay(tokens: Tensor) -> Tensor:
        bank.prepare(mapping)
        return run(tokens)

    return replay


class _Gathered(nn.Module):
    """Each row's factors at the largest rank, gathered anew at every call: y[i] += scaling·(x[i]·a[s]ᵀ)·b[s]ᵀ."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b, self.slots = base, a, b, slots

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        h = torch.bmm(x, self.a[self.slots].transpose(1, 2))
        return y.baddbmm_(h, self.b[self.slots].transpose(1, 2), alpha=2.0)


def _gathered(model: nn.Module, states: States, case: Case) -> Run:
    served, widest = _twin(model), max(case.ranks)
    slots = torch.tensor([slot % (case.adapters + 1) for slot in case.slots()], device=model.device)
    for name, layer in list(served.named_modules()):
        if not name.endswith(TARGETS[case.target]):
            continue
        key = f"base_model.model.{name}."
        a, b = (
            torch.stack([_padded(state[f"{key}{part}.weight"], widest, dim) for _, state in states])
            for part, dim in (("lora_A", 0), ("lora_B", 1))
        )
        none = [torch.cat((t, torch.zeros_like(t[:1]))) for t in (a, b)]  # the last is nobody's
        parent, _, last = name.rpartition(".")
        setattr(served.get_submodule(parent), last, _Gathered(layer, *none, slots))
    return _run(served)


def _padded(t: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(t.shape)
    missing[dim] = rank - t.shape[dim]
    return torch.cat((t, t.new_zeros(missing)), dim)


def _plain(model: nn.Module, states: States, case: Case, dtype: torch.dtype) -> Run:
    """The yardstick: the same layers by PEFT's formulation, in `dtype`; at float64 what is exact."""
    wide = copy.deepcopy(model).to(dtype)
    cast = [(config, {name: t.to(dtype) for name, t in state.items()}) for config, state in states]
    return _gathered(wide, cast, case)
