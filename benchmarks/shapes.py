"""What is measured: the projections of known models by name, and the sets of cases over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.records import BadInput

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _projections(hidden: int, q: int, kv: int, mlp: int) -> dict[str, tuple[int, int]]:
    """(K, N) of each linear of a decoder layer.   q, kv: heads × head width."""
    attention = {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden)}
    return {**attention, "gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}


MODELS = {
    "llama-3-8b": _projections(4096, 4096, 1024, 14336),
    "llama-3-70b": _projections(8192, 8192, 1024, 28672),
    "qwen3-0.6b": _projections(1024, 2048, 1024, 3072),
    "qwen3-8b": _projections(4096, 4096, 1024, 12288),
    "mistral-7b": _projections(4096, 4096, 1024, 14336),
}
SHAPES = {f"{model}.{name}": size for model, layers in MODELS.items() for name, size in layers.items()}
SHAPES["tiny"] = (48, 64)
"""(K, N) by name."""

SETS = ("tiny", "cpu", "gpu")


@dataclass(frozen=True)
class Case:
    """One layer under one load.   compiled: whether PEFT under torch.compile is worth its compile time here."""

    shape: str
    M: int
    R: int
    dtype: str
    adapter_dtype: str
    p: float
    passes: tuple[str, ...] = ("forward", "backward", "both")
    compiled: bool = False

    @property
    def K(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def N(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def name(self) -> str:
        return f"{self.shape} M{self.M} r{self.R} {mix(self.dtype, self.adapter_dtype)} p{self.p:g}"


def mix(dtype: str, adapter_dtype: str) -> str:
    """ "bf16", or "bf16+fp32" for fp32 adapters on a bf16 base."""
    return dtype if dtype == adapter_dtype else f"{dtype}+{adapter_dtype}"


def expanded(names: Sequence[str]) -> list[str]:
    """Shapes by name, a model's name standing for all of its projections.   Raises BadInput for an unknown one."""
    found = []
    for name in names:
        inside = [shape for shape in SHAPES if shape == name or shape.startswith(f"{name}.")]
        if not inside:
            choices = f"{', '.join(MODELS)}, each also with .{', .'.join(MODELS['llama-3-8b'])}, or tiny"
            raise BadInput(f"--shape: got {name!r}, wanted one of {choices}")
        found += inside
    return list(dict.fromkeys(found))


def cases(set_name: str, shapes: Sequence[str] = ()) -> list[Case]:
    """The cases of a set, the most telling first; over `shapes` instead of the set's own where any are given."""
    make = {"tiny": _tiny, "cpu": _cpu, "gpu": _gpu}[set_name]
    found: dict[str, Case] = {}
    for case in make(expanded(shapes)):
        found.setdefault(case.name, case)
    return list(found.values())


def _tiny(shapes: list[str]) -> Iterator[Case]:
    for shape in shapes or ["tiny"]:
        for p in (0.0, 0.1):
            yield Case(shape, 5, 4, "fp32", "fp32", p)
        yield Case(shape, 5, 4, "bf16", "fp32", 0.1)


def _cpu(shapes: list[str]) -> Iterator[Case]:
    """Many rows, and few, as a decoder has them or a trainer with a short batch."""
    for shape in shapes or ["qwen3-0.6b.q", "qwen3-0.6b.k", "qwen3-0.6b.down"]:
        for dtype, adapter in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            for p in (0.0, 0.1):
                for M in (512, 128, 16, 1):
                    yield Case(shape, M, 16, dtype, adapter, p, ("forward", "both"))


def _gpu(shapes: list[str]) -> Iterator[Case]:
    """What the targets are about first, for a budget may end anywhere; equal sizes under two names count once.

    A star around the first shape with adapters in bf16, its rays short; then the same with adapters in fp32, its rays
    long. PEFT is compiled for the first two cases alone: that takes longer than all else there.
    """
    wanted = shapes or [name for name in SHAPES if name != "tiny"]
    sizes: dict[tuple[int, int], str] = {}
    for name in wanted:
        sizes.setdefault(SHAPES[name], name)
    names = list(sizes.values())
    siblings = [name for name in names if name.startswith(names[0].split(".")[0])]
    centre = Case(names[0], 8192, 16, "bf16", "bf16", 0.0)
    yield from (replace(centre, p=p, compiled=True) for p in (0.0, 0.1))
    yield from (replace(centre, shape=name, p=p) for name in siblings for p in (0.0, 0.1))
    yield from (_of_rows(centre, M) for M in (1, 512, 2048))
    yield replace(centre, R=64)
    centre = replace(centre, adapter_dtype="fp32")
    yield from (replace(centre, shape=name, p=p) for name in siblings for p in (0.0, 0.1))
    yield from (_of_rows(centre, M) for M in (1, 16, 128, 512, 2048, 16384))
    yield from (replace(centre, R=R) for R in (4, 8, 32, 64, 128, 256))
    yield from (replace(centre, dtype=d, adapter_dtype=d) for d in ("fp16", "fp32"))
    yield from (replace(centre, shape=name) for name in names)


def _of_rows(case: Case, M: int) -> Case:
    """Of few rows, as a decoder has them, only the forward."""
    return replace(case, M=M, passes=case.passes if M >= 128 else ("forward",))
