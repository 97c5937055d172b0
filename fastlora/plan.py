"""What training would take, before any of it is there: parameters and bytes of each method, from a config alone.

The model is built of fake tensors (shapes on the meta device that say they are on a CPU): nothing is downloaded,
allocated or computed. Activations are counted, not estimated: its forward runs on them once for each method, through
fastlora's own layers, and what autograd would keep for backward is added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora.adapters import matches
from fastlora.functional import lora_update

MOMENTS = 2 * 4
"""Bytes that AdamW keeps for a parameter: two moments in fp32."""


@dataclass(frozen=True)
class Cost:
    """What one method trains and keeps.

    method: "full", "lora r=8", "prompt 20".   trainable: parameters, as PEFT counts them.   parameters: those and the
    frozen ones.   gradient_bytes, optimizer_bytes: of the trainable ones, AdamW's two fp32 moments.   activation_bytes:
    what a forward keeps for backward; None where the model does not run on fake tensors.   file_bytes: tensors
    of the file it saves.
    """

    method: str
    trainable: int
    parameters: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    file_bytes: int

    @property
    def share(self) -> float:
        """Trainable of all parameters."""
        return self.trainable / self.parameters


@dataclass(frozen=True)
class Plan:
    """The costs of each method on one model.

    model: its name.   dtype: its weights'.   parameters: without adapters.   targets: the layers that LoRA would take,
    by name, (K, N).   tokens: (rows, tokens a row) of the batch that the activations are of.
    """

    model: str
    dtype: str
    parameters: int
    targets: Mapping[str, tuple[int, int]]
    tokens: tuple[int, int]
    costs: tuple[Cost, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self) | {"costs": [asdict(cost) | {"share": cost.share} for cost in self.costs]}

    def __str__(self) -> str:
        heads = ("method", "trainable", "share", "gradients", "AdamW", "activations", "file")
        rows = [
            (c.method, f"{c.trainable:,}", f"{c.share:.2%}", *map(_size, (c.gradient_bytes, c.optimizer_bytes)),
             _size(c.activation_bytes), _size(c.file_bytes))
            for c in self.costs
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))
            for name, *rest in (heads, *rows)
        ]
        batch, length = self.tokens
        head = f"{self.model}: {self.parameters:,} parameters in {self.dtype}; LoRA on {len(self.targets)} layers"
        foot = (
            f"AdamW: two fp32 moments. Activations: what a forward of {batch} × {length} tokens and as many labels",
            "keeps for backward beside the weights; SDPA attention, no checkpointing, no autocast, no LoRA dropout.",
        )
        unknown = "Unknown: the model's forward does not run on fake tensors."
        said = [unknown] if any(c.activation_bytes is None for c in self.costs) else []
        return "\n".join([head, "", *lines, "", *foot, *said])


def plan(
    model: str,
    ranks: Iterable[int] = (8, 16, 32),
    targets: str | Collection[str] = "all-linear",
    virtual_tokens: int = 20,
    tokens: tuple[int, int] = (1, 512),
) -> Plan:
    """The plan for a model of transformers, for training it whole, with LoRA and with a soft prompt.

    model: a folder with a config.json, or an id whose config is in the local cache.   ranks: of LoRA.   targets:
    "all-linear", or endings of layers' names, as PEFT's target_modules.   tokens: rows and tokens a row of a batch.
    Raises ValueError for a config that is not there, for a target that no linear layer bears, for a rank, a number of
    virtual tokens or a batch below 1.
    """
    ranks = tuple(ranks)
    for name, numbers in (("ranks", ranks), ("virtual_tokens", (virtual_tokens,)), ("tokens", tokens)):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}: got {', '.join(map(str, numbers)) or 'none'}, wanted whole numbers ≥ 1")
    return plan_config(_config(model), model, ranks, targets, virtual_tokens, tokens)


def plan_config(
    config: Any,
    name: str,
    ranks: Iterable[int],
    targets: str | Collection[str],
    virtual_tokens: int,
    tokens: tuple[int, int],
) -> Plan:
    """As `plan`, from transformers' config itself."""
    with FakeTensorMode():
        model = _built(config)
        dtype, base = model.dtype, sum(p.numel() for p in model.parameters())
        trained = torch.promote_types(dtype, torch.float32)  # adapters on a 16-bit base are fp32, as PEFT makes them
        layers, width = targeted(model, targets), model.get_input_embeddings().weight.shape[1]

        def cost(method: str, trainable: int, frozen: int, dtype: torch.dtype, kept: int | None) -> Cost:
            size = trainable * dtype.itemsize
            return Cost(method, trainable, trainable + frozen, size, trainable * MOMENTS, kept, size)

        costs = [cost("full", base, 0, dtype, _kept(model, tokens))]
        model.requires_grad_(False)
        for r in ranks:
            with _adapted(model, layers, r, trained) as factors:
                kept = _kept(model, tokens, factors)
            costs.append(cost(f"lora r={r}", lora_parameters(layers.values(), r), base, trained, kept))
        prompt = nn.Parameter(torch.empty(virtual_tokens, width, dtype=trained))
        size = prompt_parameters(virtual_tokens, width, config.is_encoder_decoder)
        kept = _kept(model, tokens, [prompt], prompt)
        costs.append(cost(f"prompt {virtual_tokens}", size, base, trained, kept))
    return Plan(name, str(dtype).removeprefix("torch."), base, layers, tokens, tuple(costs))


def lora_parameters(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Trainable parameters of LoRA at rank r on layers of these (K, N): r·(K + N) each."""
    return sum(r * (K + N) for K, N in shapes)


def prompt_parameters(virtual_tokens: int, width: int, encoder_decoder: bool) -> int:
    """Parameters of PEFT's soft prompt. A seq2seq model's has as many rows again, which no gradient reaches."""
    return virtual_tokens * width * (2 if encoder_decoder else 1)


def targeted(model: nn.Module, targets: str | Collection[str]) -> dict[str, tuple[int, int]]:
    """(K, N) of each layer that PEFT would put factors on, by name; the head is no part of "all-linear".

    Raises ValueError for a name that is no linear layer's.
    """
    from transformers.pytorch_utils import Conv1D

    hugging: Any = model
    head = hugging.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    if targets == "all-linear":
        found = {name: m for name, m in linear.items() if m is not head}
    else:
        names = [targets] if isinstance(targets, str) else list(targets)
        for wanted in names:
            if not any(matches([wanted], name) for name in linear):
                have = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
                raise ValueError(f"target: got {wanted!r}, which no linear layer is called; the model has {have}")
        found = {name: m for name, m in linear.items() if matches(names, name)}
    shapes = {name: tuple(m.weight.shape) for name, m in found.items()}
    return {name: (s[1], s[0]) if isinstance(found[name], nn.Linear) else (s[0], s[1]) for name, s in shapes.items()}


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception as error:  # a config's own checks have no common type
        wanted = "a folder with a config.json or an id in the local cache"
        raise ValueError(f"model: got {model!r}, wanted {wanted}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What transformers says first; a hundred classes that would do, or advice on its hub, may follow."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _built(config: Any) -> Any:
    """The language model of the config in training mode, of fake tensors, in the dtype that the config names."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model: Any = kind.from_config(config, dtype=config.dtype or torch.float32).train()
    except ValueError as error:
        raise ValueError(f"model: {_first_line(error)}") from error
    if getattr(config, "scale_decoder_outputs", True) is False:
        # T5 1.1 and FLAN-T5: transformers notes so that config.json unties the head, and unties on reading the weights
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model


@contextlib.contextmanager
def _adapted(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], r: int, dtype: torch.dtype
) -> Iterator[list[nn.Parameter]]:
    """The layers with factors of rank r, through fastlora's op.   Yields the factors."""
    factors: list[nn.Parameter] = []

    def updating(K: int, N: int) -> Any:
        a, b = (nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in ((r, K), (N, r)))
        factors.extend((a, b))
        return lambda module, args, y: lora_update(y, args[0], a, b, 1.0, backend="torch")

    hooks = [model.get_submodule(name).register_forward_hook(updating(K, N)) for name, (K, N) in layers.items()]
    try:
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _kept(
    model: Any, tokens: tuple[int, int], adapter: Iterable[nn.Parameter] = (), prompt: nn.Parameter | None = None
) -> int | None:
    """Bytes that a forward of a batch with labels keeps for backward, beside the model's parameters and the adapter's.

    prompt: [P, d], put before the batch's embeddings.
    """
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *adapter)}
    kept: dict[int, Any] = {}  # the storages themselves: so that none is freed and its address used again

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return t

    ids, P = torch.zeros(tokens, dtype=torch.long), 0 if prompt is None else len(prompt)
    mask = torch.ones(tokens[0], tokens[1] + P, dtype=torch.long)
    written = {"decoder_input_ids": ids, "labels": ids} if model.config.is_encoder_decoder else {"labels": mask}
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            embeds = model.get_input_embeddings()(ids)
            if prompt is not None:
                embeds = torch.cat([prompt.to(embeds.dtype).expand(len(ids), -1, -1), embeds], 1)
            model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **written)
    except RuntimeError:
        return None  # such as a mixture of experts in fp32, whose grouped matmul has no fake
    return sum(storage.nbytes() for storage in kept.values())


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:,.2f} GiB"
