"""AdapterBank: one base model, one batch, every request its own LoRA adapter, its own soft prompt, both or neither.

    bank = fastlora.AdapterBank(model)
    bank.load_adapter("path/to/adapter", "a")
    with bank.use(adapter_names=["a", None], prompt_names=None):
        model.generate(**batch)

Any thread may load, delete and replace while others generate: one lock keeps the books, and a batch holds on to the
version of each adapter that it began with.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapters, serving
from fastlora.attach import Attached
from fastlora.entry import Entry
from fastlora.multi import Batch
from fastlora.pools import LayerPools, PromptPools
from fastlora.prompts import PromptOf
from fastlora.serving import BASE
from fastlora.standing import Standing
from fastlora.storage import Listing, Shelf, Storage, UnknownAdapter, Version

CACHED_BATCHES = 4
"""Mixes of adapters whose gathered factors are kept for the next `use`."""


class AdapterBank:
    """Many adapters and soft prompts on one model, each request of a batch with its own.

    model: a Hugging Face causal or sequence-to-sequence LM, or a PeftModel of one, whose LoRA adapters the bank takes
    over under their names.   max_loras, max_prompts: how many fit on the device at once.   max_total_rank: rank rows
    there, shared by all adapters: one takes its largest rank, and one row more with a lora_bias.   max_prompt_tokens:
    the same for virtual tokens.   target_modules: name endings or a regex, as PEFT's; None for every linear layer but
    the output head.   dtype: the adapters', the model's if None.   host_bytes: for adapters that wait on the host.
    fused_rows: up to so many rows (16 is a sensible number) a plain linear layer's matmul runs in our launch on a GPU;
    base rows then equal the base's to the tolerance, no longer to the bit.

    The layers are replaced by MultiLoRALinear, and the adapters' room is taken at once, where the model is: move the
    model before. Outside of `use` and `prepare` the model is its base to the bit, and
    `close` puts everything back.   Raises TypeError, ValueError.
    """

    @torch.inference_mode(False)  # the pools outlive the caller's inference mode
    def __init__(
        self,
        model: nn.Module,
        max_loras: int = 64,
        max_total_rank: int = 2048,
        max_prompts: int = 64,
        max_prompt_tokens: int = 4096,
        target_modules: Any = None,
        *,
        dtype: torch.dtype | None = None,
        host_bytes: int = 4 << 30,
        fused_rows: int = 0,
    ) -> None:
        sizes = {"max_loras": max_loras, "max_total_rank": max_total_rank, "max_prompts": max_prompts}
        for what, size in (
            sizes | {"max_prompt_tokens": max_prompt_tokens, "host_bytes": host_bytes + 1, "fused_rows": fused_rows + 1}
        ).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{what}: got {size!r}, wanted a whole number ≥ 1")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: got {dtype!r}, wanted a floating dtype")
        self._closed, self._running = False, 0
        self._lock = threading.RLock()
        self._mine = threading.local()
        self._generations = itertools.count(1)
        self._versions: dict[str, Version] = {}
        self._batches: OrderedDict[Any, Batch] = OrderedDict()
        self._attached = Attached(model, target_modules, max_loras, max_total_rank, dtype)
        self._attached.tables.fused_rows = fused_rows
        with contextlib.ExitStack() as undo:
            undo.callback(self._attached.detach)
            tables = self._attached.tables
            self._prompts = Entry(self._attached.model, max_prompts, max_prompt_tokens, tables, self._renew)
            undo.callback(self._prompts.close)
            layers = LayerPools(tables, self._attached.groups, self._attached.names)
            self._lora = Shelf("rank rows", layers, max_loras, max_total_rank)
            prompts = Shelf("virtual tokens", PromptPools(self._prompts), max_prompts, max_prompt_tokens)
            self._storage = Storage({"lora": self._lora, "prompt": prompts}, host_bytes, self._forget)
            for name, adapter in self._attached.loaded():
                self._add(adapter, name, False, None)
            self._undo = undo.pop_all()

    def load_adapter(
        self,
        path_or_state_dict: Any,
        adapter_name: str,
        *,
        pinned: bool = False,
        replace: bool = False,
        config: Any = None,
    ) -> int:
        """Take in an adapter of PEFT's, LoRA or prompt tuning; all of it, or nothing and the bank is as it was.

        path_or_state_dict: a folder as PEFT saves it, or a state dict with its `config` (PEFT's, or that as a dict).
        pinned: it stays on the device.   replace: it may take the name of another, which serves the batches that
        already run with it and then goes; what was pinned stays so.   Returns the generation number of this load.
        Raises ValueError, TypeError, FileNotFoundError for what cannot be served; RuntimeError for too little room.
        """
        if not isinstance(adapter_name, str) or adapter_name in ("", BASE):
            raise ValueError(f"adapter_name: got {adapter_name!r}, wanted a name other than {BASE!r}")
        self._check_open()
        try:
            adapter = adapters.read(path_or_state_dict, config, self._attached.target, adapter_name)
        except OverflowError as error:
            raise ValueError(f"adapter {adapter_name!r}: got a number beyond fp32 in its config: {error}") from error
        with self._lock:
            self._check_open()
            old = self._versions.get(adapter_name)
            if old is not None and not replace:
                raise ValueError(
                    f"adapter_name: got {adapter_name!r}, which is loaded; wanted replace=True or a new name"
                )
            return self._add(adapter, adapter_name, pinned or (old is not None and old.pinned), old)

    def _add(self, adapter: adapters.Adapter, name: str, pinned: bool, old: Version | None) -> int:
        for layer, factors in adapter.factors.items():
            if not abs(factors.scaling) <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"adapter {name!r}: got scaling {factors.scaling} for {layer} (lora_alpha over its rank), wanted a "
                    "finite fp32 number"
                )
        sizes = adapter.rank, adapter.rows, adapter.bytes
        version = Version(name, next(self._generations), adapter.kind, *sizes, pinned=pinned)
        self._storage.add(version, adapter, old)
        self._versions[name] = version
        self._purge()
        return version.generation

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter; batches that run with it finish with it.   Raises UnknownAdapter."""
        with self._lock:
            self._check_open()
            version = self._find(name)
            self._forget(version)
            self._storage.retire(version)

    def _forget(self, version: Version) -> None:
        del self._versions[version.name]
        self._purge()

    def _purge(self) -> None:
        """Drop the cached batches of which an adapter has left the device."""
        here = {0} | {version.generation for version in self._versions.values() if version.on_device}
        for key in [key for key in self._batches if not here.issuperset(key[2])]:
            del self._batches[key]

    def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Bring an adapter to the device and keep it there; or no longer.   Raises UnknownAdapter, RuntimeError."""
        with self._lock:
            self._check_open()
            version = self._find(name)
            if pinned:
                self._bring([version])
            version.pinned = pinned

    def list_adapters(self) -> list[Listing]:
        """All adapters, in the order of their loads."""
        with self._lock:
            self._check_open()
            versions = sorted(self._versions.values(), key=lambda v: v.generation)
            return [version.listing() for version in versions]

    def slot(self, name: str | None) -> int:
        """The number to put into a mapping for `prepare`; −1 for None or "__base__".

        The adapter is pinned with it: its slot stays its own until it is unpinned, deleted or replaced. After that the
        number is the base alone, until `slot` gives it out again, for another adapter.
        Raises UnknownAdapter; RuntimeError when there is too little room.
        """
        with self._lock:
            self._check_open()
            if name is None or name == BASE:
                return -1
            version = self._find(name, "lora")
            self.pin_adapter(name)
            if not version.given:
                version.given = True
                self._lora.pools.give(version.slot)
            return version.slot

    @contextlib.contextmanager
    def use(
        self, adapter_names: Sequence[str | None] | None = None, prompt_names: Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """The model's forward and generate, called in this thread or task inside, serve each request with its own.

        adapter_names, prompt_names: a name for each request of the batch, None or "__base__" for none; None for all
        without.   What `forward` or `generate` is called with has as many rows. (generate makes its beams and
        num_return_sequences itself; in a loop of one's own each of them is a request.)   A `use` inside of another
        takes its place, soft prompts and all, until it ends. Enter it where the model runs: other threads and tasks
        have batches of their own. A task that is begun inside has this one, and raises RuntimeError if it outlives it.
        A generator should enter it anew for each step: one that yields inside and is resumed after another `use` was
        begun, or elsewhere, is served by what holds there, and raises RuntimeError at its end.
        Raises UnknownAdapter; ValueError when the two differ in length, or, once the model runs, from the batch;
        RuntimeError when not all of them fit on the device beside what is pinned or in use.
        """
        loras, prompts = _names("adapter_names", adapter_names), _names("prompt_names", prompt_names)
        if loras is not None and prompts is not None and len(loras) != len(prompts):
            raise ValueError(f"prompt_names: got {len(prompts)} names, wanted {len(loras)} as in adapter_names")
        requests = len(loras or prompts or ())
        with self._lock:
            self._check_open()
            mine = [None if name is None else self._find(name, "lora") for name in loras or [None] * requests]
            ahead = [None if name is None else self._find(name, "prompt") for name in prompts or [None] * requests]
            held = list(dict.fromkeys(v for v in (*mine, *ahead) if v is not None))
            self._bring(held)
            batch = self._batch(mine) if requests else None
            wanted = [
                PromptOf(p.slot, p.start, p.rows, (p.generation, v.generation if v else 0)) if p else None
                for p, v in zip(ahead, mine, strict=True)
            ]
            self._running += 1
            for version in held:
                version.users += 1
        try:
            with serving.taking(serving.Turn(self._attached.tables, batch)), self._prompts.serving(wanted):
                yield
        finally:
            self._tidy()
            with self._lock:
                self._running -= 1
                for version in held:
                    self._storage.release(version)

    def _bring(self, versions: list[Version]) -> None:
        """All onto the device."""
        missing = any(not version.on_device for version in versions)
        self._storage.bring(versions)
        if missing:
            self._purge()

    def _batch(self, versions: list[Version | None]) -> Batch:
        """The Batch of these, one of the last few if they were the same, in the same places and on the same stream."""
        device = self._attached.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        slots = tuple(v.slot if v else -1 for v in versions)
        if not any(versions):
            return Batch(self._attached.tables, slots, {})
        key = stream, slots, tuple(v.generation if v else 0 for v in versions)
        if key not in self._batches:
            ranks = {v.slot: v.rank for v in versions if v}
            self._batches[key] = Batch(self._attached.tables, slots, ranks)
            if len(self._batches) > CACHED_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]

    def prepare(self, token_lora_mapping: Tensor | Sequence[int] | None) -> None:
        """Serve this thread's calls by a mapping from now on, without `use`; None for the base alone again.

        token_lora_mapping: [M], the `slot` of each row of x, tokens of a batch in their order, −1 for base only; so is
        a number that `slot` did not give out, or whose adapter is gone. It is copied into buffers that were made for
        the first mapping of M rows: later ones (int32, on the device) allocate nothing and wait for nothing, and a
        captured CUDA graph replays with the latest.

        Each forward of the model sees one version of each adapter. One that is deleted or replaced serves the forward
        that runs, and the rows are the base's from the next one on; where no forward of the model begins, in a
        captured graph or with layers called by themselves, from the next `prepare` on. Until then its rows stay taken.
        The mapping is the thread's: tasks of one event loop share it.
        Raises TypeError; ValueError, also for numbers out of bounds in a mapping on the host (on the device they are
        the base, unseen); RuntimeError inside `use`, which says itself what is served.
        """
        tables = self._attached.tables
        mapping = None if token_lora_mapping is None else _mapping(token_lora_mapping, tables.slots)
        with self._lock:
            self._check_open()
            if serving.entered(tables) is not None:
                raise RuntimeError("prepare: got a call inside of `use`, wanted it outside")
            before = serving.standing(tables)
            self._tidy()
            if mapping is None:
                standing = None
            else:
                made: dict[int, Standing] = self._mine.__dict__.setdefault("standing", {})
                if len(mapping) not in made:
                    made[len(mapping)] = Standing(tables, len(mapping))
                standing = made[len(mapping)]
                self._hold(standing)
                standing.ask(mapping)
            if before is not None and before is not standing:
                del self._lora.standing[before]
                before.rest()
            serving.stand(tables, standing)

    def _renew(self, standing: Standing) -> None:
        """What was deleted or replaced since the mapping was looked up is the base's from here on."""
        if standing.edition != self._attached.tables.edition:
            with self._lock:
                self._hold(standing)
                standing.look()

    def _hold(self, standing: Standing) -> None:
        """What a mapping may serve keeps its place as long as it stands."""
        self._lora.standing[standing] = {v for v in self._lora.resident if v.given and v.current}

    def _tidy(self) -> None:
        """Let go of outputs that wait for a layer that was never called."""
        for group in self._attached.groups:
            group.forget()

    def close(self) -> None:
        """Put the model back as it was; a PeftModel has its own layers and adapters again.

        Raises RuntimeError while a `use` runs.
        """
        with self._lock:
            if self._running:
                raise RuntimeError(f"close: got {self._running} batches that are in use, wanted none")
            if not self._closed:
                self._closed = True
                self._undo.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the bank is closed: its model serves no adapters any more")

    def _find(self, name: str, kind: str | None = None) -> Version:
        version = self._versions.get(name)
        if version is None:
            fit = [other for other, held in self._versions.items() if kind in (None, held.kind)]
            near = difflib.get_close_matches(str(name), fit, n=5, cutoff=0.5)
            known = near + [other for other in fit if other not in near]
            listed = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            raise UnknownAdapter(
                f"adapter {name!r}: not loaded, deleted, or dropped from a full host cache; wanted one of: "
                f"{listed or 'none are loaded'}"
            )
        if kind not in (None, version.kind):
            belongs = "prompt_names" if version.kind == "prompt" else "adapter_names"
            raise ValueError(f"adapter {name!r}: got a {version.kind}, wanted a {kind}; it belongs in {belongs}")
        return version


def _names(what: str, names: Sequence[str | None] | None) -> list[str | None] | None:
    """The names, None for the base.   Raises TypeError, ValueError."""
    if names is None:
        return None
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"{what}: got {names!r}, wanted a list of names, one for each request")
    if len(names) == 0:
        raise ValueError(f"{what}: got no names, wanted one for each request")
    return [None if name == BASE else name for name in names]


def _mapping(given: Any, slots: int) -> Tensor:
    """[M] whole numbers, checked where the host can see them.   Raises TypeError, ValueError."""
    what = "token_lora_mapping"
    try:
        mapping = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        wanted = f"whole numbers from −1 to {slots - 1}, one for each row"
        raise ValueError(f"{what}: got {given!r:.60}, wanted {wanted}: {error}") from error
    if mapping.dim() != 1 or len(mapping) == 0:
        raise ValueError(f"{what}: got shape {tuple(mapping.shape)}, wanted [M], a number for each of 1 row or more")
    if mapping.is_floating_point() or mapping.is_complex() or mapping.dtype == torch.bool:
        raise TypeError(f"{what}: got {mapping.dtype}, wanted whole numbers")
    if mapping.device.type == "cpu":
        low, high = (int(bound) for bound in mapping.aminmax())
        if low < -1 or high >= slots:
            raise ValueError(f"{what}: got {low} to {high}, wanted −1 to {slots - 1}, as `slot` gives them out")
    return mapping
