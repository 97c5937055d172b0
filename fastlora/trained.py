"""The side of MultiLoRALinear that trains: several jobs on one frozen layer, each with factors of its own.

A job's factors are ordinary contiguous parameters, for an optimizer of the job's own. The jobs' lora_A are views of one
pool of rank rows, so that a launch reads all of them as they lie: an optimizer's in-place step writes into the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import serving
from fastlora.checks import check_finite, check_probability, check_whole
from fastlora.functional import jobs_linear, jobs_update
from fastlora.serving import BASE


@dataclass(frozen=True)
class Mapping:
    """Whose each request of a batch is.

    names: the jobs that have a request.   jobs: of each request, its job's place among names, −1 for the base alone.
    salts: [G] int64, what makes the jobs' dropout differ: of the name alone, so that no company changes it.
    """

    names: tuple[str, ...]
    jobs: tuple[int, ...]
    salts: Tensor

    @classmethod
    def of(cls, requests: Sequence[str | None], device: torch.device) -> Mapping:
        names = tuple(dict.fromkeys(name for name in requests if name is not None and name != BASE))
        places = {name: place for place, name in enumerate(names)}
        digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
        salts = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
        return cls(names, tuple(places.get(name, -1) for name in requests), salts.to(device))  # type: ignore[arg-type]


_entering = threading.Lock()


def _who() -> tuple[int, Any]:
    """This thread and, in it, this asyncio task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs here
        task = None
    return threading.get_ident(), task


class Crew:
    """The mapping of the batch that runs, for all layers of a model: the innermost of one thread's or task's.

    It is that thread's and that task's own, and autograd's: on a GPU a checkpointed layer is recomputed in a thread of
    autograd's, which cannot tell one batch from another; so there is only one at a time.
    """

    mapping: Mapping | None = None
    said: int = 0
    _inside: tuple[Mapping, ...] = ()
    _owner: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, or a file of it, is inside of no `use`."""
        return {}

    @contextlib.contextmanager
    def use(self, requests: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Raises RuntimeError while another thread or task is inside."""
        mapping, owner = Mapping.of(requests, device), _who()
        with _entering:
            if self._inside and self._owner != owner:
                raise RuntimeError(
                    "use: got a batch while another thread or task is inside of `use`, wanted one at a time: share a "
                    "lock, or give each a copy of the model with Jobs of its own"
                )
            self._owner = owner
            self._enter((*self._inside, mapping))
        try:
            with serving.taking(serving.Turn(self, mapping)):
                yield
        finally:
            with _entering:
                self._enter(tuple(other for other in self._inside if other is not mapping))

    def _enter(self, inside: tuple[Mapping, ...]) -> None:
        self._inside, self.mapping = inside, inside[-1] if inside else None

    def current(self, x: Tensor) -> Mapping | None:
        """The mapping that a call with x is for; None outside of `use`, and in other threads and tasks.

        Raises RuntimeError for a recomputation outside, and for a task that has outlived the `use` it was begun in.
        """
        if torch.compiler.is_compiling():  # which cannot read a context variable
            return self.mapping
        turn = serving.entered(self)
        if turn is not None:
            found: Mapping = turn.batch
            return found
        if torch._C._current_graph_task_id() == -1:
            return None
        if self.mapping is None or x.is_cpu:  # there backward runs in the thread that calls it
            raise RuntimeError(
                "jobs: a checkpointed layer is recomputed outside of `use`; call backward inside it, as forward was"
            )
        return self.mapping


@dataclass(frozen=True)
class Options:
    """How a job was added; in PEFT's words.   Raises ValueError, TypeError naming what does not fit."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    lora_bias: bool

    def __post_init__(self) -> None:
        """Python's own numbers of NumPy's, which no config file takes."""
        alpha = check_finite("lora_alpha", self.lora_alpha)
        plain = {
            "r": check_whole("r", self.r, 1),
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": check_probability("lora_dropout", self.lora_dropout),
            "use_rslora": bool(self.use_rslora),
            "lora_bias": bool(self.lora_bias),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


class Job(nn.Module):
    """One layer's factors of one job.   lora_A.weight: [R, K], lora_B.weight: [N, R], lora_B.bias: [N] or None."""

    def __init__(self, weight: Tensor, K: int, N: int, options: Options) -> None:
        super().__init__()
        r = options.r
        self.lora_dropout = options.lora_dropout
        self.scaling = options.lora_alpha / (math.sqrt(r) if options.use_rslora else r)
        wide = weight.dtype in (torch.float32, torch.float64)
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype if wide else torch.float32}
        self.lora_A = nn.Linear(K, r, bias=False, **like)
        self.lora_B = nn.Linear(r, N, bias=options.lora_bias, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)


class JobLayer(nn.Module):
    """A frozen linear layer and its jobs.   base_layer: any layer [..., K] → [..., N].   jobs: by name.

    place: its name in its model.   leads: what the rows of its x begin with: "requests"; "flat", those or, in two
    dimensions, requests times tokens; "others"; or "unknown", in a model that could not be traced.
    """

    place: str
    leads: str

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.jobs = nn.ModuleDict()
        self.crew = Crew()
        self.place, self.leads = "", "requests"

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @torch.inference_mode(False)  # factors outlive the caller's inference mode
    def add_job(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """A job with factors of its own: lora_A as PEFT begins it, lora_B zero; fp32 on a 16-bit base.

        lora_alpha: as `LoRALinear`'s 16 unless given; PEFT's LoraConfig has 8.
        Raises ValueError, TypeError for a name that is taken or can be no module's, and for numbers that do not fit.
        """
        if not isinstance(name, str) or name in ("", BASE) or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"name: got {name!r}, wanted a name without a dot, and no method's of nn.ModuleDict")
        if name in self.jobs:
            raise ValueError(f"name: got {name!r}, which is a job already; wanted a new name")
        options = Options(r, lora_alpha, lora_dropout, use_rslora, lora_bias)
        base = next(self.base_layer.parameters())
        like = base if base.is_floating_point() else torch.empty(0, device=base.device)  # of a quantised base
        self.jobs[name] = Job(like, self.in_features, self.out_features, options)
        self.base_layer.requires_grad_(False)
        self._pack()

    def remove_job(self, name: str) -> None:
        """Forget a job; its parameters live on in whoever holds them.   Raises KeyError."""
        del self.jobs[name]
        self._pack()

    def job_parameters(self, name: str) -> list[nn.Parameter]:
        """lora_A: [R, K], lora_B: [N, R], and the lora_bias if there is one.   Raises KeyError."""
        return list(self.jobs[name].parameters())

    @contextlib.contextmanager
    def use_jobs(self, names: Sequence[str | None]) -> Iterator[None]:
        """Calls inside, and their backward, train the job of each request.   names: one for each, None for the base."""
        with self.crew.use(names, next(self.base_layer.parameters()).device):
            yield

    def _whose(self, x: Tensor, jobs: tuple[int, ...]) -> tuple[int, ...]:
        """The job of each equal part of x's rows, in their order.   Raises ValueError where that cannot be known."""
        requests, leads = len(jobs), self.leads
        if x.dim() == 2 and leads == "flat":
            known = x.shape[0] % requests == 0
        elif x.dim() < 2 or leads == "others" or (x.dim() == 2 and leads == "unknown"):
            known = False
        else:
            known = x.shape[0] == requests
        if known:
            return jobs
        if x.dim() > 1 and len(set(jobs)) == 1 and (requests == 1 or leads != "requests"):  # all of them one job's
            return jobs[:1]
        advice = "" if leads in ("requests", "flat") else (
            "; these may be tokens first, images, or tokens that a router picked: leave the layer out by "
            "target_modules, or give a batch to one job"
        )  # fmt: skip
        raise ValueError(
            f"x: got shape {tuple(x.shape)} in layer {self.place or 'MultiLoRALinear'}, wanted the batch's {requests} "
            f"requests first, [{requests}, …, {self.in_features}]{advice}"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pack(self) -> None:
        """Every job's lora_A in one pool of rank rows, the parameters views of it; lora_B, which lies the other way, is
        copied together when it is needed."""
        jobs: list[Any] = list(self.jobs.values())
        weights: list[Tensor] = [job.lora_A.weight for job in jobs]
        if not weights or any(type(p.data) is not Tensor for p in weights):
            return
        pool = torch.cat(weights)
        for p, rows in zip(weights, pool.split([len(p) for p in weights]), strict=True):
            p.data = rows

    def train_jobs(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The base layer's output, and each job's term on the rows of its requests."""
        mapping, base = self.crew.current(x), self.base_layer
        if mapping is None or not mapping.names:
            y: Tensor = base(x, *args, **kwargs)
            return y
        requests = self._whose(x, mapping.jobs)
        mine: list[Any] = [self.jobs[name] for name in mapping.names]
        factors = (
            [job.lora_A.weight for job in mine], [job.lora_B.weight for job in mine], [job.scaling for job in mine],
            requests,
        )  # fmt: skip
        options: dict[str, Any] = {
            "dropout_p": [job.lora_dropout for job in mine],
            "training": self.training,
            "lora_biases": [job.lora_B.bias for job in mine],
            "salts": mapping.salts,
        }
        if type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks or args or kwargs):
            return jobs_linear(x, base.weight, base.bias, *factors, **options)
        return jobs_update(base(x, *args, **kwargs), x, *factors, **options)
