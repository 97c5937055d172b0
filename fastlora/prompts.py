"""Soft prompts by request: virtual tokens before each row of a batch, of any length or none, in forward and generate.

A decoder reads them as keys and values, computed once per (prompt, adapter) and kept: a batch's cache has each row's
right before its tokens, behind its padding, so that models which count columns are right too. An encoder reads them as
embeddings, each row packed to the left. Both are done where the model's forward is entered, so whoever calls it
(generate, its beams, a loop of one's own) is served alike.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora import multi, serving
from fastlora.doors import Doors
from fastlora.virtual import (
    Packed,
    Prefix,
    before,
    begin,
    cache_key,
    check_plain,
    mask_of,
    positions_of,
    settle,
    shifted,
)

BEGUN = "_fastlora_prompts"
"""The attribute of a cache that says whose virtual tokens are in it."""

_BY_DISTANCE = "bloom", "mpt"
"""Families that take no position_ids and need none: ALiBi counts distances."""


@dataclass(frozen=True)
class PromptOf:
    """A request's soft prompt.   start, tokens: its rows of the pool.   version: of (prompt, adapter).

    Requests that are equal, and whose adapter takes the same slot, share one prefix.
    """

    slot: int
    start: int
    tokens: int
    version: tuple[int, ...]


Requests = tuple[PromptOf | None, ...]


@dataclass
class Begun:
    """What a cache begins with.   settled: every row's tokens have begun, and its virtual ones stand before them."""

    requests: Requests
    settled: bool = False


class Prompts:
    """The pool of a model's soft prompts, and what puts them before the rows of its batches.

    model: a Hugging Face causal or seq2seq language model, plain or PEFT; a causal one's cache holds plain keys and
    values.   pool: [max_tokens, d], in the dtype of the input embeddings.   kept_tokens: virtual tokens of all prefixes
    that are kept, 4·max_tokens if not given; the least recently used goes first. A prefix is good as long as the
    version: whatever else changes the model must change that.   No gradient reaches a prompt.   Raises ValueError for a
    model that generates no text.
    """

    def __init__(self, model: Any, max_prompts: int, max_tokens: int, kept_tokens: int | None = None) -> None:
        hugging = text_model(model)
        weight = hugging.get_input_embeddings().weight
        self.model, self.max_prompts = hugging, max_prompts
        self.pool = torch.zeros((max_tokens, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        self.kept_tokens = 4 * max_tokens if kept_tokens is None else kept_tokens
        self._prefixes: OrderedDict[Any, Future[Prefix]] = OrderedDict()
        self._lock = threading.Lock()
        self._current = threading.local()
        self.doors = Doors()
        if hugging.config.is_encoder_decoder:
            self.doors.install(hugging.get_encoder(), "forward", self._encoder)
            self.doors.install(hugging, "forward", self._encoder_decoder)
        else:
            self._cache = cache_key(hugging.forward)
            takes = inspect.signature(hugging.forward).parameters
            self._positioned, self._routed = "position_ids" in takes, "output_router_logits" in takes
            self._planes = hasattr(getattr(hugging, "model", None), "get_rope_index")
            self._alone = hugging.forward
            self.doors.install(hugging, "forward", self._decoder)
            self.doors.install(hugging, "generate", self._generate)

    def close(self) -> None:
        """Give the model its methods back, and free the prefixes."""
        self.doors.close()
        with self._lock:
            self._prefixes.clear()

    def store(self, slot: int, start: int, rows: Tensor, decoder_rows: Tensor | None = None) -> None:
        """Copy a prompt's virtual tokens into the pool.

        rows: [P, d].   decoder_rows: [P, d], the second half of a seq2seq prompt: PEFT saves it, and reads it nowhere
        in prompt tuning, and so do we.   Raises ValueError where slot, start or the shapes do not fit.
        """
        if rows.dim() != 2 or not len(rows) or rows.shape[1] != self.pool.shape[1]:
            raise ValueError(f"rows: got shape {tuple(rows.shape)}, wanted [tokens, {self.pool.shape[1]}]")
        if decoder_rows is not None and decoder_rows.shape != rows.shape:
            raise ValueError(f"decoder_rows: got shape {tuple(decoder_rows.shape)}, wanted {tuple(rows.shape)}")
        self._check(slot, start, len(rows))
        self.clear(slot)
        with torch.no_grad():
            self.pool[start : start + len(rows)].copy_(rows)

    def clear(self, slot: int) -> None:
        """Drop the slot's prefixes; its rows of the pool are free."""
        with self._lock:
            for key in [key for key in self._prefixes if key[0].slot == slot]:
                del self._prefixes[key]

    def _check(self, slot: int, start: int, tokens: int) -> None:
        if not 0 <= slot < self.max_prompts:
            raise ValueError(f"slot: got {slot}, wanted 0 to {self.max_prompts - 1}")
        if not 0 <= start < start + tokens <= len(self.pool):
            raise ValueError(f"start: got {start} for {tokens} tokens, wanted room for 1 or more in {len(self.pool)}")

    @contextlib.contextmanager
    def serving(self, requests: Sequence[PromptOf | None] | None) -> Iterator[None]:
        """The model, called in this thread, reads each request's virtual tokens before its rows; None: none.

        A batch has the same number of rows for each request, side by side (its beams).
        """
        prompted = [request for request in requests or () if request is not None]
        for request in prompted:
            self._check(request.slot, request.start, request.tokens)
        if prompted and self.model.training:
            raise ValueError("model: got one in training mode, wanted it after eval(): prefixes would keep its dropout")
        before = self._requests()
        self._current.requests = tuple(requests) if requests and prompted else None
        try:
            yield
        finally:
            self._current.requests = before

    def _requests(self) -> Requests | None:
        return getattr(self._current, "requests", None)

    def _tokens(self, requests: Requests, rows: int, device: torch.device) -> tuple[Tensor, int]:
        """Virtual tokens of each row: [rows], and the most of them."""
        if rows % len(requests):
            raise ValueError(f"input_ids: got {rows} rows, wanted a multiple of the batch's {len(requests)} requests")
        tokens = [request.tokens if request else 0 for request in requests]
        spread = torch.tensor(tokens).repeat_interleave(rows // len(requests))
        return spread.to(device, non_blocking=True), max(tokens)

    def _generate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """generate would count a cache's virtual tokens among input_ids: it must begin with none."""
        if any(begun_for(kwargs.get(key)) is not None for key in ("cache", "past_key_values")):
            raise ValueError("cache: got one that holds virtual tokens, wanted none or an empty one")
        return inner(*args, **kwargs)

    def _decoder(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A causal model's forward, on a cache that begins with the requests' prefixes."""
        kwargs = named(inner, args, kwargs)
        requests, cache = self._requests(), kwargs.get(self._cache)
        begun = begun_for(cache)
        if begun is not None and begun.requests != requests:
            raise ValueError("cache: got one begun for other prompts, wanted those of this batch")
        if requests is None:
            return inner(**kwargs)
        inputs = given(kwargs)
        if kwargs.get("token_type_ids") is not None and hasattr(self.model.config, "vision_config"):
            raise ValueError(
                f"token_type_ids: got some, by which {type(self.model).__name__} lets tokens attend to later ones, "
                "wanted none in a batch with soft prompts: virtual tokens are read before the row's own"
            )
        if kwargs.get("output_router_logits"):
            raise ValueError(
                "output_router_logits: got True, wanted False in a batch with soft prompts: the auxiliary loss of "
                "transformers' wants a mask of the tokens that are routed, which the virtual ones are not"
            )
        if self._routed:  # whatever the config says
            kwargs["output_router_logits"] = False
        tokens, longest = self._tokens(requests, len(inputs), inputs.device)
        prefixes = self._of(requests) if begun is None else []
        if begun is None:
            kwargs[self._cache] = begin(cache, prefixes, len(inputs), longest, self.model.config)
            begun = Begun(requests, settled=kwargs.get("attention_mask") is None)
            setattr(kwargs[self._cache], BEGUN, begun)
        past = kwargs[self._cache].get_seq_length() - longest
        mask = mask_of(kwargs, (len(inputs), past + inputs.shape[1]), inputs.device)
        if not begun.settled:
            begun.settled = settle(kwargs[self._cache], mask, past, longest)
        kwargs["attention_mask"] = before(mask, tokens, longest)
        if self._positioned:
            kwargs["position_ids"] = positions_of(kwargs, mask, inputs.shape[1], self._planes) + tokens[:, None]
        labels = kwargs.pop("labels", None)
        as_dict, use_cache = (kwargs.pop(name, None) for name in ("return_dict", "use_cache"))
        use_cache = self.model.config.get_text_config(decoder=True).use_cache if use_cache is None else use_cache
        output = inner(**kwargs, use_cache=use_cache, return_dict=True)
        fields = dict(output.items())
        if cache is None and not use_cache:
            fields.pop(self._cache, None)
        if labels is not None:
            options = {name: kwargs[name] for name in kwargs.keys() - inspect.signature(inner).parameters.keys()}
            logits = output.logits
            if prefixes and logits.shape[1] == inputs.shape[1]:  # of fewer, none stands before the first token
                logits, labels = shifted(logits, labels, mask, tokens, prefixes)
            fields["loss"] = self.model.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **options
            )
        output = type(output)(**fields)
        return output if (self.model.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    @torch.compiler.disable  # a lock, and prefixes that other threads may be reading
    def _of(self, requests: Requests) -> list[Prefix | None]:
        """Each request's prefix, under its adapter in this thread's batch."""
        batch = serving.current()
        slots = (-1,) * len(requests) if batch is None else batch.slots
        if len(slots) != len(requests):
            raise ValueError(f"requests: got {len(requests)}, wanted the {len(slots)} of the adapters' batch")
        return [None if r is None else self._prefix(r, slot, batch) for r, slot in zip(requests, slots, strict=True)]

    def _prefix(self, request: PromptOf, adapter: int, batch: multi.Batch | None) -> Prefix:
        """The kept prefix, or a new one: who asks first computes it, and only those who ask for the same one wait."""
        device = self.pool.device.type
        key = request, adapter, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        while True:
            with self._lock:
                kept = self._prefixes.get(key)
                promise = self._prefixes.setdefault(key, Future())
                self._prefixes.move_to_end(key)
                if kept is None:
                    self._make_room(request, adapter, batch)
            if kept is None:
                try:
                    promise.set_result(self._read(request, adapter, batch))
                except BaseException as error:
                    with self._lock:
                        if self._prefixes.get(key) is promise:
                            del self._prefixes[key]
                    promise.set_exception(error)
                    raise
            if promise.exception() is None:
                return promise.result()

    def _read(self, request: PromptOf, adapter: int, batch: multi.Batch | None) -> Prefix:
        """The model run on the virtual tokens alone."""
        alone = None
        if batch is not None and adapter >= 0:
            alone = multi.Batch(batch.tables, [adapter], {adapter: batch.width})
        rows = self.pool[request.start : request.start + request.tokens]
        with torch.inference_mode(False), torch.no_grad(), serving.serving(alone):
            said = {"position_ids": torch.arange(len(rows), device=rows.device)[None]} if self._positioned else {}
            output = self._alone(inputs_embeds=rows[None], use_cache=True, return_dict=True, **said)
        cache = output.get(self._cache)
        check_plain(cache)
        if not self._positioned and self.model.config.model_type not in _BY_DISTANCE:
            raise ValueError(
                f"model: got {type(self.model).__name__}, whose forward takes no position_ids, wanted one that does: a "
                "row with fewer virtual tokens than another would stand at that one's positions"
            )
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        return Prefix(type(cache), layers, output.logits[0, -1].clone())

    def _make_room(self, request: PromptOf, adapter: int, batch: multi.Batch | None) -> None:
        """Drop the prefixes of adapters that have left their slots, and the least recently used of too many."""

        def gone(prefix: PromptOf, slot: int) -> bool:
            if batch is None or slot < 0:
                return False
            return not batch.tables.widest[slot] or (slot == adapter and prefix.version[1:] != request.version[1:])

        for key in [key for key in self._prefixes if gone(*key[:2])]:
            del self._prefixes[key]
        while len(self._prefixes) > 1 and sum(kept.tokens for kept, *_ in self._prefixes) > self.kept_tokens:
            self._prefixes.popitem(last=False)

    def _encoder(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The encoder's forward, on embeddings that begin with the virtual tokens."""
        kwargs = named(inner, args, kwargs)
        requests = self._requests()
        return inner(**(kwargs if requests is None else self._embedded(requests, kwargs)))

    def _encoder_decoder(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A seq2seq model's forward: the encoder's inputs, or the mask over what it returned, with virtual tokens."""
        kwargs = named(inner, args, kwargs)
        requests, encoded = self._requests(), kwargs.get("encoder_outputs")
        if requests is None:
            return inner(**kwargs)
        if encoded is None:
            kwargs = self._embedded(requests, kwargs)
        else:
            rows, columns = encoded[0].shape[:2]
            tokens, longest = self._tokens(requests, rows, encoded[0].device)
            mask = mask_of(kwargs, (rows, columns - longest), encoded[0].device)
            kwargs["attention_mask"] = Packed.of(mask, tokens, columns).mask
        with self.serving(None):
            return inner(**kwargs)

    def _embedded(self, requests: Requests, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments in which embeddings with the virtual tokens take the place of input_ids."""
        inputs = given(kwargs)
        embeds = embeds_of(self.model, inputs)
        (rows, S), device = inputs.shape[:2], embeds.device
        tokens, longest = self._tokens(requests, rows, device)
        packed = Packed.of(mask_of(kwargs, (rows, S), device), tokens, S + longest)
        starts = torch.tensor([request.start if request else 0 for request in requests])
        first = starts.repeat_interleave(rows // len(requests)).to(device, non_blocking=True)
        at = torch.where(packed.virtual, first[:, None] + torch.arange(packed.mask.shape[1], device=device), 0)
        embeds = embeds.take_along_dim(packed.source[..., None], 1)
        embeds = torch.where(packed.virtual[..., None], self.pool[at].to(embeds.dtype), embeds)
        return kwargs | {"input_ids": None, "inputs_embeds": embeds, "attention_mask": packed.mask}


def text_model(model: Any) -> Any:
    """transformers' own model, in PEFT's or plain.   Raises ValueError for one that generates no text."""
    hugging = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (hasattr(hugging, "can_generate") and hugging.can_generate()):
        raise ValueError(f"model: got {type(hugging).__name__}, wanted one of transformers that generates text")
    return hugging


def begun_for(cache: Any) -> Begun | None:
    """What a cache begins with; None for one without virtual tokens."""
    begun: Begun | None = getattr(cache, BEGUN, None)
    return begun if begun is not None and cache.get_seq_length() else None


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments, all by name, a cache by the function's own."""
    names = inspect.signature(function).parameters if args else ()
    by_name = dict(zip(names, args, strict=False)) | kwargs
    if "past_key_values" in by_name and (key := cache_key(function)) not in by_name:
        by_name[key] = by_name.pop("past_key_values")
    return by_name


def given(kwargs: dict[str, Any]) -> Tensor:
    """input_ids: [B, S], or inputs_embeds: [B, S, d]."""
    for name in ("input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return value
    raise ValueError("input_ids: got neither these nor inputs_embeds, wanted one of them to put virtual tokens before")


def embeds_of(module: Any, inputs: Tensor) -> Tensor:
    """inputs: [B, S] ids, or [B, S, d].   Returns [B, S, d]."""
    embeds: Tensor = inputs if inputs.is_floating_point() else module.get_input_embeddings()(inputs)
    return embeds
