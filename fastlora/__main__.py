"""python -m fastlora info [--json]: versions, device, what each op resolves to and why, and a self-check.

python -m fastlora plan --model DIR_OR_ID: what training it whole, with LoRA and with a soft prompt would take.

python -m fastlora bench …: the same as python -m benchmarks …, from a checkout.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from fastlora import __version__, dispatch, functional, ops, plan, reference

_PACKAGES = ("torch", "triton", "transformers", "peft")
_SHAPES = {"one token": (1, 4096, 4096, 16), "training": (8192, 4096, 4096, 16), "narrow": (8192, 256, 1024, 16)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    cpu = f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return [cpu, *(f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


def _paths(device: str) -> dict[str, dict[str, str]]:
    """How each op would take a bf16 layer of each typical shape; shapes are described, nothing is allocated."""
    paths = {}
    for name, (M, K, N, R) in _SHAPES.items():
        x, dy = (torch.empty(1, device=device, dtype=torch.bfloat16).expand(M, size) for size in (K, N))
        paths[f"{name}: M {M}, K {K}, N {N}, R {R}, bf16"] = {
            "lora_linear": str(dispatch.decide(x, N, R)),
            "lora_backward": str(dispatch.decide(dy, K, R)),
        }
    return paths


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def self_check(device: str) -> dict[str, Any]:
    """One layer forward and backward on fresh random bf16 inputs with fp32 adapters, against float64.

    Returns {"error": {name: relative Frobenius error}, "plain": {…of plain torch}, "ok": each error ≤ 1.25 × plain's}.
    """
    M, K, N, R = 70, 200, 136, 7
    x, w, dy = (torch.randn(s, device=device).bfloat16() for s in ((M, K), (N, K), (M, N)))
    a, b = torch.randn(R, K, device=device), torch.randn(N, R, device=device)

    def run(layer: Any, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
        y = layer(leaves[0], w.to(dtype or w.dtype), None, *leaves[1:], 0.5)
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))

    def plain(x: torch.Tensor, w: torch.Tensor, bias: None, a: torch.Tensor, b: torch.Tensor, s: float) -> torch.Tensor:
        linear = torch.nn.functional.linear
        return (linear(x, w) + linear(linear(x.to(a.dtype), a), b) * s).to(x.dtype)

    exact = run(reference.lora_linear, torch.float64)
    error = {k: _error(v, exact[k]) for k, v in run(functional.lora_linear, None).items()}
    base = {k: _error(v, exact[k]) for k, v in run(plain, None).items()}
    return {"error": error, "plain": base, "ok": all(error[k] <= 1.25 * base[k] for k in error)}


def info() -> dict[str, Any]:
    """Everything `python -m fastlora info` shows, as one JSON-able value."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.empty(1, device=device)
    unavailable = ops.triton_unavailable(probe)
    return {
        "fastlora": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "environment": vars(dispatch.env),
        "kernels": unavailable or f"available, table {ops.kernels.table(ops.kernels.arch(probe))['name']}",
        "paths": _paths(device),
        "self_check": self_check(device),
    }


def _show(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _show(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}", *(f"{indent}  {item}" for item in value), sep="\n")
        else:
            print(f"{indent}{key:<14} {f'{value:.2e}' if isinstance(value, float) else value}")


def _bench(arguments: list[str]) -> int:
    """Hand over to the bench, which is no part of the package."""
    try:
        bench = importlib.import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        print(f"error: bench: it lives in the checkout, whose root is not here (no {error.name})", file=sys.stderr)
        return 2
    code: int = bench.main(arguments)
    return code


def _batch(text: str) -> tuple[int, int]:
    """ "4x512" -> (4, 512), and "512" -> (1, 512)."""
    rows, _, length = text.rpartition("x")
    return int(rows or 1), int(length)


def _plan(args: argparse.Namespace) -> int:
    targets = args.target if args.target == "all-linear" else args.target.split(",")
    try:
        planned = plan.plan(args.model, args.r, targets, args.virtual_tokens, args.tokens)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(planned.to_dict(), indent=2) if args.json else planned)
    return 0


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["bench"]:  # its own parser takes the rest, --help too
        return _bench(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m fastlora", description="fastlora: what it runs on, what training takes, and how fast it is"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="versions, device, the path of each op and why, a self-check")
    show.add_argument("--json", action="store_true", help="one JSON object on stdout")
    costs = commands.add_parser("plan", help="parameters and bytes of training a model, from its config alone")
    costs.add_argument("--model", required=True, help="a folder with a config.json, or an id in the local cache")
    costs.add_argument("--r", type=int, nargs="+", default=[8, 16, 32], help="ranks of LoRA (default: 8 16 32)")
    costs.add_argument("--target", default="all-linear", help="endings of layers' names, as q,v (default: all-linear)")
    costs.add_argument("--virtual-tokens", type=int, default=20, help="of the soft prompt (default: 20)")
    costs.add_argument("--tokens", type=_batch, default=(1, 512), help="batch, rows x tokens (default: 1x512)")
    costs.add_argument("--json", action="store_true", help="one JSON object on stdout")
    commands.add_parser("bench", help="time the kernels beside their peers, from a checkout; see bench --help")
    args = parser.parse_args(arguments)
    if args.command == "plan":
        return _plan(args)
    try:
        facts = info()
    except RuntimeError as error:  # the kernels were demanded where they cannot run
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 0 if facts["self_check"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
