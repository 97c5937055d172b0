"""Virtual tokens in the tensors of a batch: a decoder's cache that begins with them, an encoder's rows, masks, labels.

Every row has a number of its own, and is laid out by columns and masks: shapes depend on no value on the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that a decoder has read.   layers: keys and values, [H, P, D] each.   logits: [V], after its last token.

    cache: the class of the model's cache.
    """

    cache: type
    layers: list[tuple[Tensor, Tensor]]
    logits: Tensor


@dataclass(frozen=True)
class Packed:
    """Where an encoder's rows come from, when each is its virtual tokens and then its own from the first attended on.

    virtual: [B, C] bool, a virtual token stands there.   source: [B, C], else this column of the input.
    mask: [B, C], of what the row attends to.
    """

    virtual: Tensor
    source: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, tokens: Tensor, columns: int) -> Packed:
        """mask: [B, S].   tokens: [B].   columns: C."""
        column = torch.arange(columns, device=mask.device)
        source = column - tokens[:, None] + first_attended(mask)[:, None]
        virtual, S = column < tokens[:, None], mask.shape[1]
        clamped = source.clamp(0, S - 1)
        own = torch.where(source < S, mask.take_along_dim(clamped, 1), 0)
        return cls(virtual, clamped, torch.where(virtual, 1, own).to(mask.dtype))


def mask_of(kwargs: dict[str, Any], shape: tuple[int, int], device: torch.device) -> Tensor:
    """attention_mask: [B, S], ones where none is given."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.shape != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: got {got}, wanted shape {shape}, without the virtual tokens")
    return mask


def positions_of(kwargs: dict[str, Any], mask: Tensor, S: int, planes: bool = False) -> Tensor:
    """position_ids: [B, S] or [1, S]; each row's count of what it attends to before, where none are given.

    planes: the model may take [planes, B, S], of time, height and width.
    """
    positions = kwargs.get("position_ids")
    if positions is None:
        grids = [name for name, grid in kwargs.items() if name.endswith("_grid_thw") and grid is not None]
        if grids:
            raise ValueError(
                f"position_ids: got none beside {grids[0]}, by which the model places images, wanted the model's own "
                "for the tokens without virtual ones, as generate gives them"
            )
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -S:]
    if positions.dim() not in (2, 2 + planes) or positions.shape[-1] != S:
        raise ValueError(f"position_ids: got shape {tuple(positions.shape)}, wanted [rows, {S}]")
    return positions


def first_attended(mask: Tensor) -> Tensor:
    """The first column of each row that is attended to: [B]."""
    return (mask != 0).long().argmax(1)


def cache_key(forward: Callable[..., Any]) -> str:
    """What a model's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def check_plain(cache: Any) -> None:
    """Raises ValueError unless all that a cache holds is every token's key and value."""
    kinds = {type(part).__name__ for part in (cache, *getattr(cache, "layers", ()))}
    if not kinds <= {"DynamicCache", "DynamicLayer"}:
        raise ValueError(f"cache: got {', '.join(sorted(kinds))}, wanted DynamicCache of plain DynamicLayer")


def before(mask: Tensor, tokens: Tensor, longest: int) -> Tensor:
    """attention_mask: [B, longest + S], in which each row's virtual tokens stand right before its own.

    mask: [B, S].   tokens: [B].
    """
    own = longest + first_attended(mask)[:, None]
    column = torch.arange(longest + mask.shape[1], device=mask.device)
    virtual = (column >= own - tokens[:, None]) & (column < own)
    return torch.where(virtual, 1, F.pad(mask, (longest, 0))).to(mask.dtype)


def settle(cache: Any, mask: Tensor, past: int, longest: int) -> bool:
    """Let the cache's next update put the virtual tokens of rows whose own begin in it right before them.

    mask: [B, S], `past` columns of which the cache has.   Returns whether all rows have begun.   A model may count
    distances in columns (ALiBi, local windows), so padding must not come between; whether there is any is read from
    the device, once a batch.
    """
    first = first_attended(mask)
    shift = torch.where(first >= past, first, 0)
    padded, begun = torch.stack([shift.any(), (mask != 0).any(1).all()]).tolist()
    if padded:
        check_plain(cache)
        for layer in cache.layers:
            layer.update = functools.partial(_shifted_update, layer, shift, longest)
    return bool(begun)


def _shifted_update(layer: Any, shift: Tensor, longest: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The layer's own update, this once, and then its first `longest` columns go behind padding.   shift: [B]."""
    del layer.update
    layer.update(*args, **kwargs)
    source = behind(shift, longest, layer.keys.shape[-2])[:, None, :, None]
    layer.keys, layer.values = (t.take_along_dim(source, -2) for t in (layer.keys, layer.values))
    return layer.keys, layer.values


def behind(padding: Tensor, tokens: int, columns: int) -> Tensor:
    """[B, columns] of where columns come from when each row's first `tokens` go behind the padding after them.

    padding: [B], columns of it.
    """
    column, padding = torch.arange(columns, device=padding.device), padding[:, None]
    rest = torch.where(column < padding, column + tokens, column)
    return torch.where((column >= padding) & (column < padding + tokens), column - padding, rest)


@torch.compiler.disable  # once a batch, and Dynamo cannot hold a Prefix
def begin(cache: Any, prefixes: list[Prefix | None], rows: int, longest: int, config: Any) -> Any:
    """The empty cache, or a new one, filled with the rows' prefixes, each ending at the column `longest`."""
    distinct = list({id(prefix): prefix for prefix in prefixes if prefix is not None}.values())
    if cache is None:
        cache = distinct[0].cache(config=config)
    check_plain(cache)
    if cache.get_seq_length():
        raise ValueError("cache: got one of tokens without the batch's prompts, wanted an empty one")
    device = distinct[0].logits.device
    which = torch.tensor([len(distinct) if prefix is None else distinct.index(prefix) for prefix in prefixes])
    which = which.repeat_interleave(rows // len(prefixes)).to(device, non_blocking=True)
    for index, layer in enumerate(zip(*(prefix.layers for prefix in distinct), strict=True)):
        for_all = [[F.pad(t, (0, 0, longest - t.shape[-2], 0)) for t in part] for part in zip(*layer, strict=True)]
        keys, values = (torch.stack([*part, torch.zeros_like(part[0])])[which] for part in for_all)
        cache.update(keys, values, index)
    return cache


def shifted(
    logits: Tensor, labels: Tensor, mask: Tensor, tokens: Tensor, prefixes: list[Prefix | None]
) -> tuple[Tensor, Tensor]:
    """(logits, labels) of one column more, in which each row's last virtual token predicts its first own token.

    A row without virtual tokens predicts its first token from nothing, and so not from its padding either.
    """
    first, prompted = first_attended(mask)[:, None], tokens[:, None] > 0
    some = next(prefix.logits for prefix in prefixes if prefix is not None)
    last = torch.stack([torch.zeros_like(some) if prefix is None else prefix.logits for prefix in prefixes])
    last = last.repeat_interleave(len(logits) // len(prefixes), 0)[:, None]
    column = torch.arange(logits.shape[1] + 1, device=logits.device)
    here = ((column == first) & prompted)[..., None]
    logits = torch.where(here, last, F.pad(logits, (0, 0, 1, 0)))
    predicted = torch.where(column[:-1] == first, prompted, column[:-1] > 0)
    return logits, F.pad(torch.where(predicted, labels, -100), (1, 0), value=-100)
