"""One launch of each kernel on random operands: what the tuner times and what ncu and compute-sanitizer watch.

`python -m benchmarks.probe --size small expand dx` launches and says the error of each against float64.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from tests import plain
from tests.tolerance import FACTOR, one_rounding, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 1.7
KERNELS = ("expand", "dx", "shrink", "x", "dy", "add")
"""In the order in which their time matters."""

SIZES = {"tiny": (24, 40, 56, 4), "small": (200, 264, 328, 16), "large": (8192, 4096, 4096, 16)}
"""M, N, K, R."""


@dataclass(frozen=True)
class Problem:
    """One launch of `kernel` on a layer's operands; main: dtype of x, w and dy, adapter: of a and b."""

    kernel: str
    M: int
    N: int
    K: int
    R: int
    main: str = "bf16"
    adapter: str = "fp32"
    p: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.main]

    @property
    def width(self) -> int:
        """The N by which a table row is chosen: the long axis of the operand or output that the kernel walks."""
        return self.K if self.kernel in ("shrink", "x", "dx") else self.N


@dataclass(frozen=True)
class Operands:
    """Random operands of unit size, so that no term hides another's error."""

    x: Tensor
    w: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    h: Tensor
    dh: Tensor
    dy: Tensor
    p: float
    seed: Tensor

    def double(self) -> Operands:
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(self).items()}
        return Operands(**wide)


def operands(problem: Problem, device: str) -> Operands:
    """Fresh from torch's generator."""
    M, N, K, R, main, adapter = problem.M, problem.N, problem.K, problem.R, problem.dtype, DTYPES[problem.adapter]

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * std).to(dtype)

    return Operands(
        x=normal(M, K, dtype=main),
        w=normal(N, K, dtype=main, std=K**-0.5),
        bias=normal(N, dtype=main),
        a=normal(R, K, dtype=adapter, std=K**-0.5),
        b=normal(N, R, dtype=adapter, std=R**-0.5),
        h=normal(M, R, dtype=torch.float32),
        dh=normal(M, R, dtype=torch.float32, std=R**-0.5),
        dy=normal(M, N, dtype=main),
        p=problem.p,
        seed=torch.tensor(20260901, device=device),
    )


def run(module: Any, kernel: str, t: Operands, **config: Any) -> tuple[Tensor, ...]:
    """The kernel's results by `fastlora_kernels`, or by a twin of the same names: `fastlora.reference`, `plain`."""
    drop = {"p": t.p, "seed": t.seed}
    match kernel:
        case "expand":
            return (module.expand(t.x, t.w, t.bias, t.h, t.b, SCALE, **config),)
        case "dx":
            return (module.dx(t.dy, t.w, t.dh, t.a, **drop, **config),)
        case "shrink":
            return (module.shrink(t.x, t.a, **drop, **config),)
        case "x":
            return (module.x_pass(t.x, t.dh, t.a.dtype, **drop, **config),)
        case "dy":
            return tuple(module.dy_pass(t.dy, t.h, t.b, SCALE, **config))
        case "add":
            return (module.add_expand(t.dy, t.h, t.b, SCALE, **config),)
    raise ValueError(f"kernel: got {kernel!r}, wanted one of {KERNELS}")


@dataclass(frozen=True)
class Yardstick:
    """What a problem's results are held to: float64's, and the error of plain torch on the same operands."""

    exact: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @classmethod
    def of(cls, kernel: str, t: Operands) -> Yardstick:
        exact, yards = run(reference, kernel, t.double()), run(plain, kernel, t)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__.splitlines()[0])
    parser.add_argument("kernel", nargs="*", choices=[*KERNELS, []], help="all of them unless named")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--unchecked", action="store_true", help="launch only: no float64 beside, for a profiler")
    args = parser.parse_args(argv)
    good = True
    for kernel in args.kernel or KERNELS:
        t = operands(Problem(kernel, *SIZES[args.size], p=0.1), args.device)
        results = run(kernels, kernel, t)
        if not args.unchecked:
            yardstick = Yardstick.of(kernel, t)
            fine = yardstick.admits(results)
            good = good and fine
            print(
                f"{kernel:8}{'pass' if fine else 'FAIL'}  " + "  ".join(f"{e:.1e}" for e in yardstick.errors(results))
            )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
