"""Adapters as PEFT saves them, read into plain values and checked whole before anybody uses them.

A folder (adapter_config.json, adapter_model.safetensors) or a state dict with its config becomes an `Adapter`. What
fastlora would compute differently from PEFT is refused with the reason; nothing here imports PEFT.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.multi import MAX_RANK, Factors

log = logging.getLogger("fastlora")

_PLAIN_FIELDS = {
    "adapter_name", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Fields of a LoraConfig that are read here, or that change nothing once the factors are there."""

_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
PREFIX = "base_model.model."
"""What PEFT puts before a module's name in the files that it saves."""

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)")
_PROMPT_KEY = re.compile(r"prompt_embeddings|(.+\.)?prompt_encoder\.[^.]+\.embedding\.weight")


@dataclass(frozen=True)
class Adapter:
    """What one adapter adds, on the CPU.

    kind: "lora" or "prompt".   factors: by the layer's name in the model.   prompt, decoder_prompt: [P, d] virtual
    tokens; the latter for the decoder of a sequence-to-sequence model.   rank: the largest over all layers, 0 for a
    prompt.   rows: rank rows that it takes in a pool, a row for lora_bias among them, or virtual tokens.
    """

    kind: str
    rank: int
    rows: int
    factors: Mapping[str, Factors] = field(default_factory=dict)
    prompt: Tensor | None = None
    decoder_prompt: Tensor | None = None

    @property
    def bytes(self) -> int:
        tensors = [t for f in self.factors.values() for t in (f.a, f.b, f.lora_bias)]
        return sum(t.nbytes for t in (*tensors, self.prompt, self.decoder_prompt) if t is not None)

    @classmethod
    def lora(cls, factors: Mapping[str, Factors]) -> Adapter:
        rank = max(len(f.a) for f in factors.values())
        return cls("lora", rank, max(len(f.a) + (f.lora_bias is not None) for f in factors.values()), factors)


@dataclass(frozen=True)
class Target:
    """What an adapter must fit.

    layers: (K, N) of each layer that takes factors, by name.   dtype: the factors'.   modules: the names of all the
    model's modules.   embedding: d, and the dtype of virtual tokens.   encoder_decoder: prompts have decoder rows.
    weight: the base's own by its name, None for a name that is none.
    """

    layers: Mapping[str, tuple[int, int]]
    dtype: torch.dtype
    modules: Collection[str]
    embedding: tuple[int, torch.dtype]
    encoder_decoder: bool = False
    weight: Callable[[str], Tensor | None] | None = None


def read(source: Any, config: Any, target: Target, name: str) -> Adapter:
    """The adapter `name` from a folder or a state dict, in the target's dtype and checked against it.

    source: a folder's path, or a state dict.   config: with a state dict, its PEFT config or that as a dict.
    Raises FileNotFoundError, TypeError, ValueError that say what came and what was wanted.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError(f"config: got None for adapter {name!r}, wanted the PEFT config of its state dict")
        state = dict(source)
    else:
        saved, state = folder(Path(source))
        config = saved if config is None else config
    options = _options(config)
    strangers = [key for key, t in state.items() if not isinstance(key, str) or not isinstance(t, Tensor)]
    if strangers:
        raise TypeError(f"adapter {name!r}: got {strangers[0]!r} that is no tensor by its name, wanted a state dict")
    kind = str(getattr(options.get("peft_type"), "value", options.get("peft_type")))
    if kind == "LORA":
        return _lora(state, options, target, name)
    if kind == "PROMPT_TUNING":
        return _prompt(state, options, target, name)
    raise ValueError(f"adapter {name!r}: got peft_type {kind!r}, wanted 'LORA' or 'PROMPT_TUNING'")


def folder(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors."""
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        hint = "; adapter_model.bin is a pickle, which may run code: save it again as safetensors"
        pickled = (path / "adapter_model.bin").is_file()
        raise FileNotFoundError(f"{path}: wanted adapter_model.safetensors in it{hint if pickled else ''}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'adapter_config.json'}: not JSON: {error}") from error
    try:
        return config, load_file(weights)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{weights}: not a safetensors file, or a damaged one: {error}") from error


def save(path: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write what `folder` reads, as PEFT does, each of the two files at once."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    files = path / "adapter_model.safetensors", path / "adapter_config.json"
    weights, written = (file.with_name(f"{file.name}.part") for file in files)
    save_file(state, weights, metadata={"format": "pt"})
    written.write_text(json.dumps(config, indent=2))
    weights.replace(files[0])
    written.replace(files[1])


def _options(config: Any) -> dict[str, Any]:
    options = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(options, dict):
        raise TypeError(f"config: got {type(config).__name__}, wanted a dict or a PEFT config")
    return options


def refuse_variants(options: dict[str, Any], name: str) -> None:
    """Raise ValueError for what is more than factors: another formula, other weights, other layers."""
    if (options.get("bias") or "none") != "none":
        raise ValueError(f"adapter {name!r}: got bias={options['bias']!r}: it changes the base's biases; wanted 'none'")
    for key, value in options.items():
        if value and key != "bias" and key not in _PLAIN_FIELDS:
            raise ValueError(f"adapter {name!r}: got {key}={value!r}, a variant of LoRA that fastlora does not serve")
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise ValueError(
            f"adapter {name!r}: got init_lora_weights={start!r}, which changes the base's weights too; wanted factors "
            "for the base as it is: save it by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
            "or say init_lora_weights=true in its config if this base is the changed one"
        )
    if start == "lora_ga":
        log.warning(
            "adapter %r: init_lora_weights='lora_ga' may have changed the base that it was trained on; it is put on "
            "this one as it is, as PEFT's from_pretrained does", name,
        )  # fmt: skip


def _number(key: str, name: str, value: Any, whole: bool) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise ValueError(f"adapter {name!r}: got {key}={value!r}, wanted a finite number")
    return value


def _patterned(options: dict[str, Any], key: str, patterns: str, layer: str, name: str) -> Any:
    """PEFT's value for one layer: that of the first pattern whose expression ends the layer's name, or the common."""
    by_pattern = options.get(patterns) or {}
    try:
        found = next((p for p in by_pattern if re.match(rf"(.*\.)?({p})$", layer)), None)
    except (re.error, TypeError) as error:
        raise ValueError(f"adapter {name!r}: got {patterns}={by_pattern!r}: {error}") from error
    value = options.get(key, 8) if found is None else by_pattern[found]
    return _number(key, name, value, whole=key == "r")


def matches(names: Any, layer: str) -> bool:
    """Whether PEFT's target_modules or exclude_modules, a regex or a list of name endings, means the layer."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def _targeted(options: dict[str, Any], layer: str) -> bool:
    """Whether PEFT would put factors of this config on the layer."""
    if options.get("exclude_modules") and matches(options["exclude_modules"], layer):
        return False
    wanted = options.get("target_modules")
    if wanted is None or not matches(wanted, layer):
        return False
    indices = options.get("layers_to_transform")
    if isinstance(wanted, str) or indices is None or indices == []:
        return True
    patterns = options.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer)
        if found:
            return int(found[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def _lora(state: dict[str, Tensor], options: dict[str, Any], target: Target, name: str) -> Adapter:
    refuse_variants(options, name)
    parts = _parts(_without_base(state, target, name), name)
    lacking = sorted(module for module in parts if module not in target.modules)
    unserved = sorted(module for module in parts if module in target.modules and module not in target.layers)
    if unserved:
        raise ValueError(
            f"adapter {name!r}: got factors for {_some(unserved)}, which the model has and the bank does not serve; "
            "wanted its target_modules to take them in"
        )
    factors = {
        layer: _factors(layer, found, options, target, name) for layer, found in parts.items() if layer in target.layers
    }
    if not factors:
        raise ValueError(f"adapter {name!r}: got factors for none of the model's layers ({_some(lacking)})")
    try:
        missing = [layer for layer in target.layers if layer not in factors and _targeted(options, layer)]
    except (re.error, TypeError) as error:
        raise ValueError(f"adapter {name!r}: got target_modules {options.get('target_modules')!r}: {error}") from error
    if missing:
        log.warning("adapter %r has no factors for %s: the base serves there", name, _some(missing))
    if lacking:
        log.warning("adapter %r: the model lacks %s: ignored, as PEFT does", name, _some(lacking))
    return Adapter.lora(factors)


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _without_base(state: dict[str, Tensor], target: Target, name: str) -> dict[str, Tensor]:
    """The state less what PEFT saves of the base: its embeddings, with an adapter on the head or on them.

    Raises ValueError for one that differs from the model's.
    """
    left = {}
    for key, t in state.items():
        weight = key.removeprefix(PREFIX)
        mine = target.weight(weight) if target.weight is not None and _KEY.fullmatch(key) is None else None
        if mine is None:
            left[key] = t
        elif t.shape != mine.shape or not torch.equal(t.to(mine.device, mine.dtype), mine):
            raise ValueError(f"adapter {name!r}: got {weight} of a base that differs from the model's there")
    return left


def _parts(state: dict[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """{layer: {"lora_A.weight": …}}.   Raises ValueError for other tensors, and for several adapters in one."""
    parts: dict[str, dict[str, Tensor]] = {}
    adapters = set()
    for key, t in state.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"adapter {name!r}: got {key}, a variant of LoRA that fastlora does not serve, or damaged")
        adapters.add(found["adapter"])
        parts.setdefault(found["module"].removeprefix(PREFIX), {})[f"{found['part']}.{found['what']}"] = t
    if len(adapters) > 1:
        raise ValueError(f"adapter {name!r}: got factors of {sorted(map(str, adapters))} in one, wanted one adapter's")
    return parts


def _factors(layer: str, found: dict[str, Tensor], options: dict[str, Any], target: Target, name: str) -> Factors:
    """One layer's factors.   Raises ValueError unless they are whole, fit the layer and are finite."""
    rank = _patterned(options, "r", "rank_pattern", layer, name)
    alpha = _patterned(options, "lora_alpha", "alpha_pattern", layer, name)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"adapter {name!r}: got rank {rank} for {layer}, wanted 1 to {MAX_RANK}")
    K, N = target.layers[layer]
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, K), "lora_B.weight": (N, rank)}
    if options.get("lora_bias"):
        shapes["lora_B.bias"] = (N,)
    for part in [*shapes, *(part for part in found if part not in shapes)]:
        if part not in found:
            raise ValueError(f"adapter {name!r}: {layer}.{part} is missing")
        if part not in shapes:
            raise ValueError(f"adapter {name!r}: got {layer}.{part}, which its config does not mention")
        _fits(f"adapter {name!r}: {layer}.{part}", found[part], shapes[part])
    mine = {part: _cast(f"adapter {name!r}: {layer}.{part}", found[part], target.dtype) for part in shapes}
    scaling = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    return Factors(mine["lora_A.weight"], mine["lora_B.weight"], mine.get("lora_B.bias"), scaling)


def _fits(what: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{what}: got shape {tuple(t.shape)}, wanted {shape}")
    if not t.is_floating_point():
        raise ValueError(f"{what}: got dtype {t.dtype}, wanted a floating dtype")


def _cast(what: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of its own on the CPU.   Raises ValueError unless all of it is finite in that dtype."""
    mine = t.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(mine.isfinite().all()):
        raise ValueError(f"{what}: got NaN or infinite values (in {dtype}), wanted finite ones")
    return mine


def _prompt(state: dict[str, Tensor], options: dict[str, Any], target: Target, name: str) -> Adapter:
    found = [t for key, t in state.items() if _PROMPT_KEY.fullmatch(key)]
    if len(found) != 1 or len(state) != 1:
        raise ValueError(f"adapter {name!r}: got {_some(sorted(state))}, wanted prompt_embeddings alone")
    tokens = _number("num_virtual_tokens", name, options.get("num_virtual_tokens"), whole=True)
    if tokens < 1:
        raise ValueError(f"adapter {name!r}: got num_virtual_tokens={tokens}, wanted 1 or more")
    what = f"adapter {name!r}: prompt_embeddings"
    width, dtype = target.embedding
    task = str(getattr(options.get("task_type"), "value", options.get("task_type")))
    if target.encoder_decoder and task == "CAUSAL_LM":
        raise ValueError(f"adapter {name!r}: got task_type {task!r} for an encoder-decoder, wanted 'SEQ_2_SEQ_LM'")
    most = 2 if target.encoder_decoder else 1
    parts = options.get("num_transformer_submodules") or most
    if parts not in (1, most):
        raise ValueError(f"adapter {name!r}: got num_transformer_submodules={parts!r}, wanted 1 to {most}")
    _fits(what, found[0], (tokens * parts, width))
    rows = _cast(what, found[0], dtype)
    decoder_rows = rows[tokens:] if parts == 2 else None
    return Adapter("prompt", 0, tokens, prompt=rows[:tokens], decoder_prompt=decoder_rows)
