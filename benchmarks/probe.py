"""One launch of each kernel on random operands: what the tuner times and what ncu and compute-sanitizer watch.

`python -m benchmarks.probe --size small expand dx` launches and says the error of each against float64.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import plain
import torch
from tolerance import FACTOR, one_rounding, relative_error
from torch import Tensor
from torch.nn.functional import silu

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Drops, Routes, Tile
from fastlora_kernels.dropout import empty_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 1.7
GEMMS = ("expand", "dx", "group_dx")
READ = ("dx", "add", "group_dx", "group_add")
"""Kernels that find their masks where the x pass left them."""
KERNELS = (
    "group_shrink", "group_x", "group_dy", "expand", "dx", "group_dx", "group_add",
    "shrink", "x", "dy", "add", "glu", "glu_backward",
)  # fmt: skip
"""In the order in which the tuner takes them: what is predicted to lose most comes first."""
MULTI = "multi"
"""All kernels of many adapters, which the tuner does not take."""

SIZES = {
    "tiny": (24, 40, 56, 4),
    "small": (200, 264, 328, 16),
    "long": (24, 40, 1040, 16),
    "described": (640, 256, 256, 16),
    "large": (8192, 4096, 4096, 16),
}
"""M, N, K, R. long: shrink sums it in parts. described: tables ask for tensor descriptors from M = 513 on."""


@dataclass(frozen=True)
class Problem:
    """One launch of `kernel` on a layer's operands; main: dtype of x, w and dy, adapter: of a and b.

    p: dropout of every member.   others: N of a group's further members.   For glu x is the gate, and K its width.
    """

    kernel: str
    M: int
    N: int
    K: int
    R: int
    main: str = "bf16"
    adapter: str = "fp32"
    p: float = 0.0
    others: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.main]

    @property
    def Ns(self) -> tuple[int, ...]:
        return (self.N, *self.others)

    @property
    def masks(self) -> int:
        """How many members the kernel masks by what it reads: what bounds rows of a table."""
        return len(self.Ns) if self.p > 0 and self.kernel in READ else 0

    @property
    def sizes(self) -> dict[str, int]:
        """By what a table's row is chosen; N: the long axis of the operand or output that the kernel walks."""
        by_output = self.kernel in ("expand", "dy", "group_dy") or (self.kernel == "add" and self.p == 0)
        return {"M": self.M, "N": max(self.Ns) if by_output else self.K, "R": self.R, "masks": self.masks}


@dataclass(frozen=True)
class Operands:
    """Random operands of unit size, so that no term hides another's error; a tuple has one a member.

    u, grad: [M, K]; with x as its gate, the up of a gated MLP and what flows back into their product.
    bits: masks that are left or read, None without dropout.
    """

    x: Tensor
    u: Tensor
    grad: Tensor
    ws: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    as_: tuple[Tensor, ...]
    bs: tuple[Tensor, ...]
    hs: tuple[Tensor, ...]
    dhs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]
    ps: tuple[float, ...]
    seeds: Tensor
    bits: Tensor | None

    def double(self) -> Operands:
        def wide(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(wide, value))
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return Operands(**{name: wide(value) for name, value in vars(self).items()})


def operands(problem: Problem, device: str) -> Operands:
    """Fresh from torch's generator; where the kernel reads masks, the x pass has left them."""
    M, Ns, K, R, main, adapter = problem.M, problem.Ns, problem.K, problem.R, problem.dtype, DTYPES[problem.adapter]

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * std).to(dtype)

    def of_all(std: float = 1.0) -> tuple[Tensor, ...]:
        """A member's columns behind those of the members before it, as in a group's h."""
        return normal(M, R * len(Ns), dtype=torch.float32, std=std).split(R, dim=1)

    x = normal(M, K, dtype=main)
    t = Operands(
        x=x,
        u=normal(M, K, dtype=main),
        grad=normal(M, K, dtype=main),
        ws=tuple(normal(N, K, dtype=main, std=K**-0.5) for N in Ns),
        biases=tuple(normal(N, dtype=main) for N in Ns),
        as_=tuple(normal(R, K, dtype=adapter, std=K**-0.5) for _ in Ns),
        bs=tuple(normal(N, R, dtype=adapter, std=R**-0.5) for N in Ns),
        hs=of_all(),
        dhs=of_all(R**-0.5),
        dys=tuple(normal(M, N, dtype=main) for N in Ns),
        ps=(problem.p,) * len(Ns),
        seeds=torch.arange(20260901, 20260901 + len(Ns), device=device),
        bits=empty_bits(len(Ns), x) if problem.p > 0 else None,
    )
    if problem.masks:
        launch("group_x", t)
    return t


def launch(kernel: str, t: Operands, config: Tile | None = None) -> tuple[Tensor, ...]:
    """The kernel's results, by its launcher. That of a group takes one layer too."""
    masked: dict[str, Any] = {"ps": t.ps, "seeds": t.seeds, "config": config}
    every = [True] * len(t.ws)
    match kernel:
        case "expand":
            return (kernels.expand(t.x, t.ws[0], t.biases[0], t.hs[0], t.bs[0], SCALE, config=config),)
        case "add" if not any(t.ps):
            return (kernels.low_rank(t.hs[0], t.bs[0], SCALE, t.x.dtype, config=config),)
        case "shrink" | "group_shrink":
            return (kernels.group_shrink(t.x, t.as_, **masked),)
        case "x" | "group_x":
            return tuple(kernels.group_x_pass(t.x, t.dhs, [a.dtype for a in t.as_], bits=t.bits, **masked))
        case "dy" | "group_dy":
            scales = [SCALE] * len(t.ws)
            dh, dbs = kernels.group_dy_pass(t.dys, t.hs, t.bs, scales, want_dh=every, want_db=every, config=config)
            return (dh, *dbs)
        case "dx" | "group_dx":
            return (kernels.group_dx(t.dys, t.ws, t.dhs, t.as_, bits=t.bits, **masked),)
        case "add" | "group_add":
            return (kernels.group_low_rank_dx(t.dhs, t.as_, t.x.dtype, bits=t.bits, **masked),)
        case "glu":
            return kernels.glu(t.x, t.u, "silu", t.as_[0], p=t.ps[0], seed=t.seeds[0], config=config)
        case "glu_backward":
            return kernels.glu_backward(t.x, t.u, t.grad, "silu", want_z=True, config=config)
    raise ValueError(f"kernel: got {kernel!r}, wanted one of {KERNELS}")


def twin(module: Any, kernel: str, t: Operands) -> tuple[Tensor, ...]:
    """The same by plain torch, a member after the other, with the layer's ops from `reference` or `plain`."""
    drops = [{"p": p, "seed": seed} for p, seed in zip(t.ps, t.seeds, strict=True)]
    match kernel:
        case "expand":
            return (module.expand(t.x, t.ws[0], t.biases[0], t.hs[0], t.bs[0], SCALE),)
        case "add" if not any(t.ps):
            return (module.add_expand(torch.zeros_like(t.dys[0]), t.hs[0], t.bs[0], SCALE),)
        case "shrink" | "group_shrink":
            return (torch.cat([module.shrink(t.x, a, **drop) for a, drop in zip(t.as_, drops, strict=True)], 1),)
        case "x" | "group_x":
            members = zip(t.dhs, t.as_, drops, strict=True)
            return tuple(module.x_pass(t.x, dh, a.dtype, **drop) for dh, a, drop in members)
        case "dy" | "group_dy":
            dhs, dbs = zip(
                *(module.dy_pass(*member, SCALE) for member in zip(t.dys, t.hs, t.bs, strict=True)), strict=True
            )
            return (torch.cat(dhs, 1), *dbs)
        case "dx" | "group_dx":
            terms = zip(t.dys, t.ws, t.dhs, t.as_, drops, strict=True)
            return (sum(module.dx(dy, w, dh, a, **drop) for dy, w, dh, a, drop in terms),)
        case "add" | "group_add":
            members = zip(t.dhs, t.as_, drops, strict=True)
            return (sum(module.dx(t.x, None, dh, a, **drop) for dh, a, drop in members),)
        case "glu":
            z = silu(t.x) * t.u
            return z, module.shrink(z, t.as_[0], **drops[0])
        case "glu_backward":
            with torch.enable_grad():
                g, u = t.x.detach().requires_grad_(), t.u.detach().requires_grad_()
                z = silu(g) * u
                return (*torch.autograd.grad(z, (g, u), t.grad), z.detach())
    raise ValueError(f"kernel: got {kernel!r}, wanted one of {KERNELS}")


def launch_multi(M: int, N: int, K: int, R: int, device: str) -> None:
    """The kernels of many adapters: two of them, one with a bias, and base rows between; as served and as trained."""

    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    start, rank, biased, none, rows = numbers(0, R + 1), numbers(R, R // 2), numbers(1, 0), numbers(0, 0), 2 * R + 1
    x, y, a_pool, b_pool = normal(M, K), normal(M, N), normal(1, rows, K), normal(rows, N)
    slots, scaling = torch.arange(M, device=device).remainder(3).int() - 1, torch.ones(1, 2, device=device)
    drops = Drops(torch.tensor([1, 2], device=device), numbers(6554, 0))
    routes = kernels.route(slots, Routes.empty(M, 2, device))
    h = kernels.multi_shrink(x, a_pool, start, rank[None], R, routes)
    kernels.multi_expand([y], h, [b_pool], start, rank[None], scaling, biased[None], routes)
    kernels.multi_linear(x, normal(N, K), None, h[:, 0], b_pool, start, rank, scaling[0], biased, slots)
    h = kernels.multi_shrink(x, a_pool, start, rank[None], R, routes, factor=scaling[0], drops=drops, whole=True)
    kernels.multi_expand([y], h, [b_pool], start, rank[None], scaling, none[None], routes, drops=drops)
    for of, by_feature in ((x, False), (y, True)):
        kernels.multi_outer(
            of, h[0, 0], start, rank, none, scaling[0], rows, routes, torch.float32,
            by_feature=by_feature, drops=None if by_feature else drops,
        )  # fmt: skip


@dataclass(frozen=True)
class Yardstick:
    """What a problem's results are held to: float64's, and the error of plain torch on the same operands."""

    exact: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @classmethod
    def of(cls, kernel: str, t: Operands) -> Yardstick:
        exact, yards = twin(reference, kernel, t.double()), twin(plain, kernel, t)
        allowed = (
            max(FACTOR * relative_error(yard, true), one_rounding(yard.dtype))
            for yard, true in zip(yards, exact, strict=True)
        )
        return cls(exact, tuple(allowed))

    def errors(self, results: tuple[Tensor, ...]) -> list[float]:
        return [relative_error(ours, true) for ours, true in zip(results, self.exact, strict=True)]

    def admits(self, results: tuple[Tensor, ...]) -> bool:
        """Whether the results pass the tolerance policy."""
        return all(error <= most for error, most in zip(self.errors(results), self.allowed, strict=True))


def refusal(error: Exception) -> str | None:
    """What Triton or ptxas refused a tile for: too much shared or tensor memory, a shape it cannot compile.

    None for an error of our own. The compiler's and the driver's refusals have no common type.
    """
    if type(error).__module__.startswith("triton") or "Triton" in str(error) or "ptxas" in str(error):
        return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    return None


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, launches that are only to be compiled, in one of a dozen processes beside the one that measures.

    What is refused here is refused there, and what finds no memory is compiled there. No memory is kept: what a dozen
    allocators hold on to, up to 4 GiB each, an H100 has not beside the operands of what is measured.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        pass
    except Exception as error:
        if refusal(error) is None:
            raise
    finally:
        torch.cuda.empty_cache()


def _wait(device: str) -> None:
    """What goes wrong on a GPU is said at the next synchronisation."""
    if device == "cuda":
        torch.cuda.synchronize()


def attempt(size: str, kernel: str, device: str, unchecked: bool) -> bool:
    """Launch one, and say its error unless unchecked.   Returns whether its results pass."""
    M, N, K, R = SIZES[size]
    if kernel == MULTI:
        launch_multi(M, N, K, R, device)
        _wait(device)
        print(f"{size} {kernel:13}launched")
        return True
    torch.manual_seed(0)
    members = (N // 2,) if kernel.startswith("group") else ()
    t = operands(Problem(kernel, M, N, K, R, p=0.1, others=members), device)
    if unchecked:
        launch(kernel, t)
        _wait(device)
        return True
    yardstick = Yardstick.of(kernel, t)
    results = launch(kernel, t)
    fine, errors = yardstick.admits(results), yardstick.errors(results)
    print(f"{size} {kernel:13}{'pass' if fine else 'FAIL'}  " + "  ".join(f"{e:.1e}" for e in errors))
    return fine


def main(argv: list[str] | None = None) -> int:
    names = (*KERNELS, MULTI)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", nargs="*", choices=[*names, []], help="all of them unless named, and a sum in parts")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--described", action="store_true", help="the GEMMs also where tables ask for descriptors")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--unchecked", action="store_true", help="launch only: no float64 beside, for a profiler")
    parser.add_argument("--jobs", type=int, default=0, help="processes to launch in, so that they compile side by side")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, and torch sees no GPU; cpu, with TRITON_INTERPRET=1, is interpreted")
    cases = [(args.size, kernel) for kernel in args.kernel] or [
        *((args.size, kernel) for kernel in names),
        ("long", "shrink"),
    ]
    cases += [("described", kernel) for kernel in GEMMS] * args.described
    given = [(*case, args.device, args.unchecked) for case in cases]
    if args.jobs:
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            good = list(pool.map(attempt, *zip(*given, strict=True)))
    else:
        good = [attempt(*case) for case in given]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
