"""Jobs: several fine-tuning runs on one frozen model and in one batch, each with its own LoRA adapter.

    jobs = fastlora.Jobs(model, target_modules=["q_proj", "v_proj"])
    jobs.add("a", r=8)
    optimizer = torch.optim.AdamW(jobs.parameters("a"))
    with jobs.use(["a", "a", "b", "b"]):      # the job of each request of the batch
        loss = model(**batch)...
        loss.backward()                       # a's gradients are those of a's own rows
    jobs.save("a", folder)                    # as PEFT saves it

What has no request in a batch gets no gradient (None), so its optimizer leaves it as it is: jobs join, pause and finish
between steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapters, groups
from fastlora.attach import Seats
from fastlora.doors import Doors
from fastlora.serving import BASE
from fastlora.trained import Crew, Options

_IDS = 7, 3
"""Requests and tokens of the run that shows where they are in a layer's x: numbers that heads and experts are not."""


class Jobs:
    """Several jobs on one model.

    model: any module with linear layers, not a PeftModel.   target_modules: name endings or a regex, as PEFT's; None
    for every linear layer but the output head.   Where several jobs share a batch, x of a layer has the requests first.
    The layers are replaced by MultiLoRALinear and every parameter of the
    model is frozen; `close` puts both back.   Outside of `use` the model is its base, to the bit.
    Raises TypeError, ValueError.
    """

    def __init__(self, model: nn.Module, target_modules: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
        seats = Seats(model, target_modules)
        for place in seats.places:
            if place.base is not place.layer:
                raise TypeError(
                    f"model: got a {type(place.layer).__name__} at {place.name}, wanted a plain model: unload() a "
                    "PeftModel, and load its adapter from its folder by Jobs.load"
                )
        self._model, self._seats, self._closed = model, seats, False
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for p in self._trained:
            p.requires_grad_(False)
        leads = _leads(model, {name: place.layer for name, place in seats.named.items()})
        self.layers = seats.fill()
        self._crew = Crew()
        for name, layer in self.layers.items():
            layer.crew, layer.place, layer.leads = self._crew, name, leads.get(name, "unknown")
        self._jobs: dict[str, Options] = {}
        self._doors = Doors()
        self._doors.keep_layers(model, "jobs have the model's layers, wanted Jobs.save, or it after their close()")

    @property
    def names(self) -> list[str]:
        """The jobs, in the order of their joining."""
        return list(self._jobs)

    def add(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """A new job, with LoRA of its own on every layer.   Raises ValueError, TypeError.

        r, lora_alpha, lora_dropout, use_rslora, lora_bias: as in PEFT's LoraConfig; unless given, lora_alpha is 16, as
        `LoRALinear`'s, where PEFT has 8.
        """
        options = Options(r, lora_alpha, lora_dropout, use_rslora, lora_bias)
        with contextlib.ExitStack() as undo:
            for layer in self.layers.values():
                layer.add_job(name, **asdict(options))
                undo.callback(layer.remove_job, name)
            undo.pop_all()
        self._jobs[name] = options

    def remove(self, name: str) -> None:
        """Forget a job, and free its room.   Raises KeyError."""
        self._find(name)
        for layer in self.layers.values():
            layer.remove_job(name)
        del self._jobs[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What the job's optimizer is to train; the same objects until the job is removed.   Raises KeyError.

        Views of tensors that all jobs share: to give a job away take `state_dict` or `save`, for torch.save of these
        would write the other jobs' factors too.
        """
        self._find(name)
        return [p for layer in self.layers.values() for p in layer.job_parameters(name)]

    @contextlib.contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """The model's forward and backward, called inside, take each request for the job of its name.

        names: one for each request of the batch, None or "__base__" for the base alone.   Dropout of a job is that of
        its own rows, numbered from its first: alone in a batch, padded alike, under the same `torch.manual_seed`, it
        would be the same. With gradient checkpointing, call backward inside, too.   One thread or asyncio task may be
        inside at a time; in others the model is its base.
        Raises KeyError, TypeError, ValueError; RuntimeError for a second thread or task, and after `close`.
        """
        if self._closed:
            raise RuntimeError("use: got a call after close(), where the model is its base, wanted it before")
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"names: got {names!r}, wanted a list of names, one for each request")
        if len(names) == 0:
            raise ValueError("names: got none, wanted one for each request")
        for name in dict.fromkeys(names):
            if name is not None and name != BASE:
                self._find(name)
        with self._crew.use(names, self._seats.device):
            yield

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The job's factors under the names that PEFT saves them by, as copies on the CPU.   Raises KeyError."""
        self._find(name)
        return {
            f"{adapters.PREFIX}{layer}.{key}": t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for layer, module in self.layers.items()
            for key, t in module.jobs[name].named_parameters()
        }

    @torch.no_grad()
    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy factors in: all of them, or nothing is changed.   state: as `state_dict` gives it, or PEFT's.

        Raises KeyError for a job that is not there, ValueError for a state that does not fit.
        """
        self._find(name)
        mine = {
            f"{adapters.PREFIX}{layer}.{key}": p
            for layer, module in self.layers.items()
            for key, p in module.jobs[name].named_parameters()
        }
        if state.keys() != mine.keys():
            odd = sorted(state.keys() ^ mine.keys())
            raise ValueError(f"state: job {name!r} and it differ in {', '.join(odd[:5])}, of {len(odd)}")
        for key, p in mine.items():
            if not isinstance(state[key], Tensor) or state[key].shape != p.shape:
                got = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
                raise ValueError(f"state: got {key} of shape {got}, wanted {tuple(p.shape)}")
        for key, p in mine.items():
            p.copy_(state[key])

    def save(self, name: str, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT's LoRA does, each at once.

        base_model: the name or folder of the model that it was trained on, the model's own if None.   Raises KeyError.
        """
        state, options = self.state_dict(name), asdict(self._jobs[name])
        config: Any = getattr(self._model, "config", None)
        conv1d = {"Conv1D" in {kind.__name__ for kind in type(m.base_layer).__mro__} for m in self.layers.values()}
        options |= {
            "base_model_name_or_path": base_model or getattr(config, "_name_or_path", None) or None,
            "bias": "none",
            "fan_in_fan_out": conv1d == {True},
            "inference_mode": True,
            "peft_type": "LORA",
            "target_modules": list(self.layers),
            "task_type": "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM",
        }
        adapters.save(Path(folder), options, state)

    def load(self, folder: str | os.PathLike[str], name: str) -> None:
        """A job that goes on from a folder that `save` or PEFT's LoRA wrote, on exactly these layers.

        Raises FileNotFoundError, ValueError for what is no plain LoRA of one rank on all of them; then no job is added.
        """
        options, state = adapters.folder(Path(folder))
        plain = {key: options[key] for key in Options.__dataclass_fields__ if key in options}
        kind = options.get("peft_type")
        if kind != "LORA" or options.get("rank_pattern") or options.get("alpha_pattern"):
            raise ValueError(
                f"folder: got {folder} of peft_type {kind!r}, wanted 'LORA' without rank or alpha patterns"
            )
        adapters.refuse_variants(options, name)
        self.add(name, **plain)
        try:
            self.load_state_dict(name, state)
        except ValueError:
            self.remove(name)
            raise

    def close(self) -> None:
        """The model as it was, with its own layers, and trainable where it was."""
        if not self._closed:
            self._closed = True
            self._doors.close()
            self._seats.clear()
            for p in self._trained:
                p.requires_grad_(True)

    def _find(self, name: str) -> None:
        if name not in self._jobs:
            raise KeyError(f"job {name!r}: not added, or removed; wanted one of: {', '.join(self._jobs) or 'none yet'}")


def _leads(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """JobLayer.leads of all layers, of a run of the model without data; of none where it cannot be run so.

    What a run on token ids does not call, as a tower for images, may begin with anything.
    """
    requests, tokens = _IDS
    calls, failed = groups.trace(model, layers, ids=_IDS)
    found = {} if failed else dict.fromkeys(layers.keys() - {call.name for call in calls}, "others")
    for call in calls:
        first, *others = call.x.shape[:-1]
        here = "flat" if (first, others) == (requests * tokens, []) else "requests" if first == requests else "others"
        found[call.name] = max(found.get(call.name, here), here, key=("requests", "flat", "others").index)
    return found
