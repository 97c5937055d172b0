"""python -m benchmarks [SUITE…]: time LoRA's implementations beside each other, gated by correctness.

    python -m benchmarks                                  every suite on this machine's GPU, or on its CPU
    python -m benchmarks linear --shape llama-3-8b.down   one suite over one shape
    python -m benchmarks compare OLD NEW                  what moved beyond noise
    python -m benchmarks report                           docs/benchmarks.md from the results

A plugin is an implementation of yours, `--plugin module:function`, called once a case as

    function(x, w, bias, a, b, scale, p) -> callable or None

with x: [M, K], w: [N, K], bias: [N] or None, a: [R, K], b: [N, R] and two numbers. The callable takes nothing and
returns y = x·wᵀ + bias + scale·drop(x)·aᵀ·bᵀ, differentiable to x, a and b, its dropout mask drawn anew at each call
from torch's generator; None says that it does not apply. It passes the same gate as ours, or is not timed. The suites
linear and overhead take it.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import layers, machine, records, table
from benchmarks.clock import first_line
from benchmarks.contest import Bench, Found
from benchmarks.records import SUITES, BadInput
from benchmarks.shapes import SETS, expanded
from fastlora.__main__ import UNREAD

COMMANDS = ("compare", "report")
RESULTS = machine.ROOT / "benchmarks" / "results"
TINY = machine.ROOT / "out" / "benchmarks"
"""For the set of that name, whose times are never checked in."""

TAKES = {"--plugin": ("linear", "overhead"), "--shape": ("linear",)}
"""The suites that an option means something to."""

ROUNDS = {"tiny": 3, "cpu": 20, "gpu": 30}
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Errors are one line and an exit code, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; all unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU unless given, the CPU where there is none")
    parser.add_argument("--set", choices=SETS, dest="set_name", help="which cases: cpu or gpu by the device, or tiny")
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="NAME", help="of linear alone: a model, or model.projection"
    )
    parser.add_argument("--impl", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(layers.IMPLS)}")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE:FUNCTION",
        help="one more, of linear and overhead; see above",
    )  # fmt: skip
    parser.add_argument(
        "--rounds",
        type=_positive,
        help=f"timed rounds a case, on a CPU up to ten times as many of short ones; by set {ROUNDS}",
    )
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="when to stop, between two cases")
    parser.add_argument("--threads", type=_positive, help="of a CPU, on as many of its cores")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where SUITE.json goes; benchmarks/results/<device>, or out/benchmarks/<device> of tiny",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number ≥ 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number of seconds ≥ 0")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench.   Returns 0, 1 where a result was refused, 2 for bad input, 130 interrupted, 141 unread."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            return _command(arguments)
        args = _parser().parse_args(arguments)
        with machine.pinned(args.threads):
            return _run(args, arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the results so far are written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as of `| head`: what is left goes nowhere, nor is it tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("nobody reads on: the results so far are written", file=sys.stderr)
        return UNREAD
    finally:
        table.clear()


def _command(arguments: list[str]) -> int:
    parser = _Parser(prog="python -m benchmarks")
    module = importlib.import_module(f"benchmarks.{arguments[0]}")
    module.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    code: int = args.func(args)
    return code


def _run(args: argparse.Namespace, arguments: list[str]) -> int:
    for suite in args.suites:
        if suite not in SUITES:
            raise BadInput(f"suite: got {suite!r}, wanted some of {', '.join(SUITES)}, or {' or '.join(COMMANDS)}")
    impls = layers.chosen(args.impl, args.plugin)
    expanded(args.shape)
    wanted = list(dict.fromkeys(args.suites)) or list(SUITES)
    left_alone = _untaken({"--plugin": args.plugin, "--shape": args.shape}, wanted)
    here = machine.find(args.device, quick=args.set_name == "tiny")
    set_name = args.set_name or {"cpu": "cpu", "cuda": "gpu"}[here.device.type]
    rounds = args.rounds or ROUNDS[set_name]
    bench = Bench(
        here, impls, rounds, set_name, tuple(args.shape), compile=any("compiled" in name for name in args.impl)
    )
    stamp = {**here.stamp(arguments), "slug": here.slug, "set": set_name, "rounds": rounds}
    out = args.out or (TINY if set_name == "tiny" else RESULTS) / here.slug
    _prove_writable(out)
    for line in left_alone:
        print(line, file=sys.stderr)
    deadline = time.monotonic() + args.budget if args.budget is not None else None
    print(f"{here.name}, {here.threads} threads: copy {here.ceilings.copy_gb_s:.1f} GB/s, matmul TFLOP/s "
          + ", ".join(f"{dtype} {rate:.2f}" for dtype, rate in here.ceilings.matmul_tflop_s.items()))  # fmt: skip
    refused = 0
    for index, name in enumerate(wanted):
        share = None
        if deadline is not None:  # what is left, shared among the suites that are left
            share = time.monotonic() + (deadline - time.monotonic()) / (len(wanted) - index)
        refused += _suite(name, bench, stamp, out / f"{name}.json", share, args.impl)
    return 1 if refused else 0


def _untaken(options: dict[str, list[str]], wanted: list[str]) -> list[str]:
    """A line for each option given that some of the suites take no notice of.   Raises BadInput where all do."""
    lines = []
    for option, given in options.items():
        without = [suite for suite in wanted if suite not in TAKES[option]]
        if given and without == wanted:
            raise BadInput(f"{option}: got {', '.join(wanted)}, wanted with it any of {', '.join(TAKES[option])}")
        if given and without:
            lines.append(f"{option} does not apply to {', '.join(without)}")
    return lines


def _prove_writable(out: Path) -> None:
    """Raises BadInput before anything is measured, rather than after the first case."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(f"--out: got {str(out)!r}, wanted a folder that can be written ({error.strerror})") from error


def _suite(
    name: str, bench: Bench, stamp: dict[str, Any], path: Path, deadline: float | None, asked: Sequence[str]
) -> int:
    """Run one suite, its file rewritten after each case.   Returns how many results the gate refused.

    asked: the implementations that the user named, each of which is found in some case or said to be in none.
    """
    try:
        suite = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        reason = "not there yet" if error.name == f"benchmarks.{name}" else f"needs {error.name}"
        print(f"{name}: {reason}, skipped", file=sys.stderr)
        return 0
    found: list[records.Record] = []
    refused: list[str] = []
    eager: list[str] = []
    cases = suite.cases(bench)
    print(
        f"\n{name}: {len(cases)} cases, {bench.rounds} rounds, more of short calls, fewer of long ones\n{table.HEADER}"
    )
    for done, case in enumerate(cases):
        if done and deadline is not None and time.monotonic() > deadline:  # one case at the least
            print(f"{name}: out of time, {len(cases) - done} of {len(cases)} cases left out", file=sys.stderr)
            break
        table.bar(done, len(cases), f"{name} {case.name}")
        torch.manual_seed(done)
        try:
            of_case = suite.measure(case, bench)
        except Exception as error:  # one case out of memory must not cost the others
            of_case = Found(refused=[f"{case.name}: {first_line(error)}"])
        found += of_case.records
        refused += of_case.refused
        eager += of_case.eager
        table.clear()
        records.write(path, {"suite": name, **stamp, "refused": refused, "eager": eager}, found)
        print(table.rows(of_case.records, of_case.refused), flush=True)
    said = {record.impl for record in found}.union(*(line.split() for line in refused))
    absent = [impl for impl in asked if said.isdisjoint({impl, f"{impl}:"})]
    if absent:
        print(f"{name}: none of its cases has {', '.join(absent)}", file=sys.stderr)
    return len(refused)


if __name__ == "__main__":
    sys.exit(main())
