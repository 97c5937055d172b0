"""python -m fastlora info [--json]: versions, device, what each op resolves to and why, and a self-check.

python -m fastlora plan --model DIR_OR_ID: what training it whole, with LoRA and with a soft prompt would take.

python -m fastlora bench …: the same as python -m benchmarks …, from a checkout.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from fastlora import __version__, dispatch, functional, ops, plan, reference
from fastlora.dispatch import Decision

UNREAD = 141
"""128 + SIGPIPE, what a shell says of a program that wrote to no reader."""

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


def _ops(x: torch.Tensor, N: int, R: int) -> dict[str, Decision]:
    """By op, how it takes x: [..., K] where every layer has N out features and rank R, and nothing drops.

    A group is of three layers; a gated MLP is N wide inside and gives K features, and its layers are told apart. An
    op for many adapters has no choice but the backend, and takes few rows where it takes many.
    """
    K, members = x.shape[-1], ops.GROUP
    alone = dispatch.decide(x, N, R)
    if alone.path == "triton":
        z = x.new_empty(1).expand(*x.shape[:-1], N)
        down, down_dx = dispatch.main_gemm("expand", z, K, N, R), dispatch.main_gemm("dx", z, N, K, R)
        dx, update = dispatch.main_gemm("dx", x, K, N, R), dispatch.low_rank("add", x, N, R)
        group_dx, gated_dx = (dispatch.main_gemm("group_dx", x, K, N, R, count) for count in (members, 2))
    else:
        down = down_dx = dx = update = group_dx = gated_dx = alone
    single = {"lora_linear": alone, "lora_backward": dx, "lora_update": update}
    group = {"lora_group": alone, "lora_group_backward": group_dx}
    gated = {
        "lora_gated: gate, up": alone,
        "lora_gated: down": down,
        "lora_gated_backward: down": down_dx,
        "lora_gated_backward: gate, up": gated_dx,
    }
    for together, count in ((group, members), (gated, 2)):
        if not functional.together(x, alone.path, count):
            together.update({op: replace(how, why=f"one by one; {how.why}") for op, how in together.items()})
    many = dict.fromkeys(("jobs_linear", "jobs_update", "jobs_backward", "multi_update_", "multi_linear"), alone)
    if dispatch.backend_of(x) == "triton":
        many |= dict.fromkeys(("jobs_linear", "jobs_update", "multi_update_"), dispatch.low_rank("multi_expand", x, N))
        many |= {"jobs_backward": dispatch.low_rank("multi_expand", x, K)}
        many |= {"multi_linear": dispatch.low_rank("multi_linear", x, N)}
    return single | group | gated | many


def _paths(device: str) -> dict[str, dict[str, str]]:
    """How each op would take bf16 layers of each typical shape; shapes are described, nothing is allocated."""
    paths = {}
    for name, (M, K, N, R) in _SHAPES.items():
        x = torch.empty(1, device=device, dtype=torch.bfloat16).expand(M, K)
        paths[f"{name}: M {M}, K {K}, N {N}, R {R}, bf16"] = {op: str(how) for op, how in _ops(x, N, R).items()}
    return paths


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def _kept(M: int, K: int, p: float, device: str) -> torch.Tensor:
    """[M, K] bool, what dropout keeps of an x from torch's random state as it is: seen on 1s that pass through."""
    x, eye = torch.ones((M, K), device=device, dtype=torch.bfloat16), torch.eye(K, device=device)
    return functional.lora_linear(x, torch.zeros_like(x[:1]).expand(K, K), None, eye, eye, 1.0, dropout_p=p) != 0


def _check(device: str, adapters: torch.dtype, p: float) -> dict[str, Any]:
    """One layer forward and backward on fresh random bf16 inputs, against float64.

    Returns {"error": {name: relative Frobenius error}, "plain": {…of plain torch}, "kept": the share that dropout left,
    "ok": each error ≤ 1.25 × plain's, and as much kept as p says}.
    """
    M, K, N, R = 70, 200, 136, 7
    x, w, dy = (torch.randn(s, device=device).bfloat16() for s in ((M, K), (N, K), (M, N)))
    a, b = (torch.randn(s, device=device).to(adapters) for s in ((R, K), (N, R)))
    seed = int(torch.randint(2**62, ()))

    def ours(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed)
        return functional.lora_linear(x, w, None, a, b, 0.5, dropout_p=p)

    def plain(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = linear(torch.where(keep, x / (1 - p), 0).to(a.dtype), a)
        return (linear(x, w) + linear(h, b) * 0.5).to(x.dtype)

    def exactly(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = reference.shrink(torch.where(keep, x / (1 - p), 0), a)
        return reference.add_expand(linear(x, w), h, b, 0.5)

    def run(layer: Any, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, a, b)]
        y = layer(leaves[0], w.to(dtype or w.dtype), *leaves[1:])
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))

    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(seed)
        keep = _kept(M, K, p, device)
        actual = run(ours, None)
    exact, share = run(exactly, torch.float64), float(keep.float().mean())
    error = {name: _error(t, exact[name]) for name, t in actual.items()}
    base = {name: _error(t, exact[name]) for name, t in run(plain, None).items()}
    as_told = abs(share - (1 - p)) <= 6 * math.sqrt(p * (1 - p) / keep.numel())
    return {
        "error": error, "plain": base, "kept": share,
        "ok": as_told and all(error[name] <= 1.25 * base[name] for name in error),
    }  # fmt: skip


def self_check(device: str) -> dict[str, Any]:
    """A bf16 layer, with bf16 and with fp32 adapters, and with dropout.   Returns {case: `_check`'s, "ok": all are}."""
    cases = {
        "bf16 adapters": _check(device, torch.bfloat16, 0.0),
        "fp32 adapters": _check(device, torch.float32, 0.0),
        "fp32 adapters, dropout 0.25": _check(device, torch.float32, 0.25),
    }
    return {**cases, "ok": all(case["ok"] for case in cases.values())}


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
            print(f"{indent}{key:<29} {f'{value:.2e}' if isinstance(value, float) else value}")


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
    try:
        return int(rows or 1), int(length)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted rows x tokens, as 4x512, or tokens") from None


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
    """Run a command.   Returns 0, 1 where the self-check fails, 2 for bad input, 141 where nobody reads on."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: what is left goes nowhere, nor is it tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    return code


def _main(arguments: list[str]) -> int:
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
    except (RuntimeError, ValueError) as error:  # the kernels were demanded where they cannot run, or have no table
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 0 if facts["self_check"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
