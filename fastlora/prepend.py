"""Soft prompts in a model: its forward reads the active one before every row, in training and in generation alike.

The model stays the object it was, under a subclass of its own class and name: Trainer, PEFT's LoRA, checkpointing,
autocast and generate see nothing new. Each row computes what it would alone, were its virtual tokens and its own
simply put one after the other: padding moves no position, and never comes between.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlora.prompts import embeds_of, given, named, text_model
from fastlora.soft import SoftPrompt
from fastlora.virtual import Packed, before, behind, cache_key, first_attended, mask_of, positions_of, settle

READ = "_fastlora_soft_prompt"
"""The attribute of a cache that says which soft prompt is in it."""

_ENCODED = ("input_ids", "inputs_embeds", "attention_mask", "output_attentions", "output_hidden_states")


@dataclass
class Read:
    """What a cache begins with.   prompt: the id of a SoftPrompt.   settled: every row's own tokens have begun."""

    prompt: int
    settled: bool = False


class SoftPrompts(nn.ModuleDict):
    """A model's soft prompts by name, the submodule `soft_prompts` of what reads them: the decoder, or an encoder.

    active: the name of the one that is read, or None.
    """

    active: str | None = None

    @property
    def reading(self) -> SoftPrompt | None:
        """The active prompt."""
        return None if self.active is None else self[self.active]  # type: ignore[return-value]


def add_soft_prompt(model: Any, prompt: SoftPrompt | int, name: str = "default", **options: Any) -> SoftPrompt:
    """Put a soft prompt into a model of transformers, in place, and make it the active one.   Returns it.

    model: a causal or seq2seq language model; PEFT's LoRA around it, patched or not, or LoRALinear in it, before or
    after.   prompt: a SoftPrompt, or how many virtual tokens to make one of, with SoftPrompt's `options`.

    With a model's first prompt all its parameters are frozen, but for LoRA's; PEFT freezes for itself. To train prompt
    and LoRA apart, freeze either: `prompt.requires_grad_(False)`. PEFT's get_peft_model freezes a prompt that is there
    before it.   Raises ValueError for a name that is taken, embeddings that differ, a model that cannot read one.
    """
    hugging = text_model(model)
    if isinstance(prompt, SoftPrompt):
        if options:
            raise ValueError(f"options: got {', '.join(options)} beside a SoftPrompt, which has begun already")
    else:
        seq2seq = hugging.config.is_encoder_decoder
        prompt = SoftPrompt(prompt, hugging.get_input_embeddings(), encoder_decoder=seq2seq, **options)
    width = hugging.get_input_embeddings().weight.shape[1]
    if prompt.weight.shape[1] != width:
        raise ValueError(f"prompt: got virtual tokens of {prompt.weight.shape[1]}, wanted the model's {width}")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name: got {name!r}, wanted one without a dot")
    prompts = getattr(_reader(hugging), "soft_prompts", None)
    if prompts is None:
        prompts = _install(model, hugging)
    if name in prompts:
        raise ValueError(f"name: got {name!r}, which the model has; it has {', '.join(prompts)}")
    prompts[name] = prompt
    prompts.active = name
    return prompt


def load_soft_prompt(model: Any, folder: str | os.PathLike[str], name: str = "default") -> SoftPrompt:
    """As `add_soft_prompt`, with the prompt that a folder of ours or of PEFT's holds."""
    hugging = text_model(model)
    seq2seq = hugging.config.is_encoder_decoder
    prompt = SoftPrompt.load(folder, hugging.get_input_embeddings(), encoder_decoder=seq2seq)
    return add_soft_prompt(model, prompt, name)


def set_soft_prompt(model: Any, name: str | None) -> None:
    """Let the model read the prompt of that name from now on; None: none.   Raises ValueError for one it lacks."""
    prompts = _prompts(model)
    if name is not None and name not in prompts:
        raise ValueError(f"name: got {name!r}, wanted one of the model's: {', '.join(prompts)}")
    prompts.active = name


def remove_soft_prompts(model: Any) -> None:
    """Give the model its own class back, without its prompts. Frozen parameters stay frozen."""
    _prompts(model)
    hugging = text_model(model)
    reader = _reader(hugging)
    for module in {id(m): m for m in (hugging, reader)}.values():
        _become(module, type(module).__bases__[0])
    del reader.soft_prompts


def _prompts(model: Any) -> SoftPrompts:
    prompts = getattr(_reader(text_model(model)), "soft_prompts", None)
    if prompts is None:
        raise ValueError("model: got one without soft prompts, wanted one that add_soft_prompt gave some")
    found: SoftPrompts = prompts
    return found


def _reader(hugging: Any) -> Any:
    return hugging.get_encoder() if hugging.config.is_encoder_decoder else hugging


def _install(model: Any, hugging: Any) -> SoftPrompts:
    reader = _reader(hugging)
    if any("forward" in vars(m) and "_old_forward" not in vars(m) for m in (hugging, reader)):
        raise ValueError("model: got one whose forward is replaced (by a bank, or Trainer), wanted it before that")
    if model is hugging:
        for name, parameter in hugging.named_parameters():
            if "lora_" not in name:
                parameter.requires_grad_(False)
    reader.soft_prompts = SoftPrompts()
    changes: list[tuple[Any, Any]] = [(hugging, _decode)]
    if reader is not hugging:
        changes = [(reader, _encode), (hugging, _encode_decode)]
    for module, around in changes:
        kind: Any = type(module)
        _become(module, _prompted(kind, around))
    return reader.soft_prompts


def _become(module: Any, kind: Any) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hooks, on quantised bases, kept the method of the class before
        module._old_forward = types.MethodType(kind.forward, module)


@functools.cache
def _prompted(kind: Hashable, around: Callable[..., Any]) -> Any:
    """The class, with around(self, inner, kwargs) for its forward."""
    base: Any = kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(base.forward, self)
        return around(self, inner, named(inner, args, kwargs))

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # Trainer's columns
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**body, "forward": forward})


def _decode(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A causal model's forward: virtual tokens stand before each row's first, and are in its cache from then on."""
    prompt, cache = self.soft_prompts.reading, kwargs.get(cache_key(inner))
    past = 0 if cache is None else cache.get_seq_length()
    read: Read | None = getattr(cache, READ, None) if past else None
    if past and (None if read is None else read.prompt) != (None if prompt is None else id(prompt)):
        raise ValueError("cache: got one begun with another soft prompt, wanted the active one's")
    if prompt is None:
        return inner(**kwargs)
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"cache: got {type(cache).__name__}, without room for virtual tokens; wanted a DynamicCache")
    inputs, P = given(kwargs), len(prompt)
    (rows, S), device = inputs.shape[:2], inputs.device
    padded = kwargs.get("attention_mask") is not None
    mask = mask_of(kwargs, (rows, past - P + S if past else S), device)
    read = Read(id(prompt), settled=not padded) if read is None else read
    if past and not read.settled:
        read.settled = settle(cache, mask, past - P, P)
    kwargs["attention_mask"] = before(mask, torch.full((rows,), P, device=device), P)

    def behind_padding(t: Tensor) -> Tensor:
        """t: [B, P + S, ...], the virtual tokens first."""
        if past or not padded:
            return t
        source = behind(first_attended(mask), P, P + S)
        return t.take_along_dim(source[..., None] if t.dim() == 3 else source, 1)

    if "position_ids" in inspect.signature(self.forward).parameters:
        own = positions_of(kwargs, mask, S) + P
        virtual = torch.arange(0 if past else P, device=device)
        kwargs["position_ids"] = behind_padding(torch.cat([virtual.expand(len(own), -1), own], 1))
    if not past:
        kwargs |= {"input_ids": None, "inputs_embeds": behind_padding(prompt(embeds_of(self, inputs)))}
        if kwargs.get("labels") is not None:
            kwargs["labels"] = behind_padding(F.pad(kwargs["labels"], (P, 0), value=-100))
    output = inner(**kwargs)
    for part in output if isinstance(output, tuple) else output.values():
        if hasattr(part, "get_seq_length"):
            setattr(part, READ, read)
    return output


def _encode(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """The encoder's forward: each row is its virtual tokens, then its own from the first that is attended to."""
    prompt = self.soft_prompts.reading
    if prompt is None:
        return inner(**kwargs)
    inputs = given(kwargs)
    embeds, P = embeds_of(self, inputs), len(prompt)
    packed = _packed(prompt, mask_of(kwargs, (len(embeds), embeds.shape[1]), embeds.device))
    embeds = prompt(embeds.take_along_dim(packed.source[:, P:, None], 1))
    return inner(**kwargs | {"input_ids": None, "inputs_embeds": embeds, "attention_mask": packed.mask})


def _encode_decode(self: Any, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """A seq2seq model's forward: the encoder's, and the mask over what it returned."""
    encoder, encoded = self.get_encoder(), kwargs.get("encoder_outputs")
    prompt = encoder.soft_prompts.reading
    if prompt is None:
        return inner(**kwargs)
    if encoded is None:
        given_to_it = {name: kwargs[name] for name in _ENCODED if name in kwargs}
        encoded = kwargs["encoder_outputs"] = encoder(**given_to_it, return_dict=True)
    rows, columns = encoded[0].shape[:2]
    packed = _packed(prompt, mask_of(kwargs, (rows, columns - len(prompt)), encoded[0].device))
    return inner(**kwargs | {"input_ids": None, "inputs_embeds": None, "attention_mask": packed.mask})


def _packed(prompt: SoftPrompt, mask: Tensor) -> Packed:
    tokens = torch.full((len(mask),), len(prompt), device=mask.device)
    return Packed.of(mask, tokens, len(prompt) + mask.shape[1])
