"""The same requests in plain PEFT: each alone, all in one batch by its loop over adapters, tenant after tenant."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """A text, and whose it is: an adapter, a soft prompt, both or neither."""

    text: str
    adapter: str | None = None
    prompt: str | None = None

    @property
    def tenant(self) -> str:
        return " + ".join(filter(None, (self.adapter, self.prompt))) or "base"


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    tokens = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}


def answers(model: Any, batch: dict[str, Tensor], tokens: int, **more: Any) -> list[list[int]]:
    """Greedy new tokens of each row, up to its end."""
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, **more)
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    rows: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def alone(
    model: PreTrainedModel, folders: dict[str, Path], requests: Sequence[Request], tokenizer: Any, tokens: int
) -> list[list[int]]:
    """Each request by itself in plain PEFT; it refuses LoRA with a prompt, so there the adapter is merged first.

    Prompts without a cache: with transformers 5.24, PEFT 0.21.2 generates other tokens on one.
    """
    answered: dict[Request, list[int]] = {}
    for adapter, prompt in dict.fromkeys((request.adapter, request.prompt) for request in requests):
        plain: Any = copy.deepcopy(model)
        if adapter:
            plain = PeftModel.from_pretrained(plain, folders[adapter])
            plain = plain.merge_and_unload() if prompt else plain
        if prompt:
            plain = PeftModel.from_pretrained(plain, folders[prompt])
        for request in requests:
            if (request.adapter, request.prompt) == (adapter, prompt):
                batch = padded(tokenizer, [request.text], model.device)
                answered[request] = answers(plain.eval(), batch, tokens, use_cache=not prompt)[0]
    return [answered[request] for request in requests]


def sides(
    base: PreTrainedModel, folders: dict[str, Path], requests: Sequence[Request], tokenizer: Any, tokens: int
) -> dict[str, Callable[[], Any]]:
    """PEFT's two ways to serve LoRA rows: its loop over adapters in one batch, and the tenants one after another."""
    names = [request.adapter for request in requests]
    known = {name: f"tenant {number}" for number, name in enumerate(dict.fromkeys(filter(None, names)))}
    model: Any = copy.deepcopy(base)
    for name, ours in known.items():  # PEFT takes no name with a dot in it
        if isinstance(model, PeftModel):
            model.load_adapter(folders[name], adapter_name=ours)
        else:
            model = PeftModel.from_pretrained(model, folders[name], adapter_name=ours)
    model.eval()
    batch_of_all = padded(tokenizer, [request.text for request in requests], base.device)
    mine = {name: [r.text for r in requests if r.adapter == name] for name in dict.fromkeys(names)}
    batches = {name: padded(tokenizer, texts, base.device) for name, texts in mine.items()}

    def in_turn() -> None:
        for name, batch in batches.items():
            if name is None:
                with model.disable_adapter():
                    answers(model, batch, tokens, min_new_tokens=tokens)
            else:
                model.set_adapter(known[name])
                answers(model, batch, tokens, min_new_tokens=tokens)

    def mixed() -> list[list[int]]:
        each = [known[name] if name else "__base__" for name in names]
        return answers(model, batch_of_all, tokens, min_new_tokens=tokens, adapter_names=each)

    return {"PEFT, mixed": mixed, "one tenant at a time": in_turn}
