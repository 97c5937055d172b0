"""Everything a GPU can tell, part by part, each on its own budget: `make gpu [PARTS=…] [BUDGET=240] [DEVICE=cpu]`.

Files in $OUT, or under benchmarks/results/<device>/, or out/gpu/ of a CPU: run.json (what each part came to, rewritten
after each), run.log (all that was printed), tables/<arch>.json (tuned), one JSON a suite. An interrupted run leaves
what was written so far, and a call for other parts what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.probe import SIZES
from benchmarks.records import SUITES, BadInput
from fastlora_kernels.traffic import Layer

ROOT = Path(__file__).parents[1]

BUDGETS = {"environment": 15, "tests": 150, "tune": 135, "bench": 150, "sanitize": 35, "profile": 35}
"""Seconds of each part, 520 together: the whole ends inside nine minutes."""

PROFILED = ("expand", "dx", "dy")
OURS = "regex:^_(expand|persistent|dy)_kernel$"
"""What ncu counts: the launches of PROFILED, and neither torch's kernels nor a sum of their parts."""


@dataclass
class Run:
    """Where the parts write, and what they came to; what an earlier call for other parts left there stays."""

    device: str
    out: Path
    scale: float = 1.0
    outcomes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = (self.out / "run.log").open("a")
        except OSError as error:
            raise BadInput(f"OUT: got {self.out}, wanted a folder that can be written ({error.strerror})") from error
        with contextlib.suppress(OSError, ValueError):  # none yet, or cut off
            held = json.loads((self.out / "run.json").read_text())
            self.outcomes = {part: of for part, of in held.items() if part in PARTS} if isinstance(held, dict) else {}

    def own(self, seconds: float) -> str:
        """What a part that stops by itself is told: most of its time on a GPU, a twentieth of it on a CPU."""
        return f"{seconds * self.scale * (0.85 if self.device == 'cuda' else 0.05):.0f}"

    def command(self, *words: str, seconds: float) -> tuple[int | None, str]:
        """Run one, its output to the log.   Returns (exit code, None when time ran out; the output)."""
        (code,), text = self.together(words, seconds=seconds)
        return code, text

    def together(self, *commands: Sequence[str], seconds: float) -> tuple[list[int | None], str]:
        """Run some side by side, as `command` does one; their outputs are mixed line by line."""
        self.log.write("".join(f"\n$ {' '.join(words)}\n" for words in commands))
        self.log.flush()
        start, deadline = self.log.tell(), time.monotonic() + seconds * self.scale
        child = {**os.environ, **self.environment()}
        running: list[subprocess.Popen[bytes]] = []
        codes: list[int | None] = [None] * len(commands)
        try:
            for words in commands:
                running.append(
                    subprocess.Popen(
                        words, cwd=ROOT, env=child, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            for at, process in enumerate(running):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    codes[at] = process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # done, out of time or interrupted: what they started goes with them
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.log.flush()
        with Path(self.log.name).open(errors="replace") as log:
            log.seek(start)
            text = log.read()
        self.log.seek(0, os.SEEK_END)
        return codes, text

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        if self.device == "cpu":
            found["TRITON_INTERPRET"] = "1"
        if (self.out / "tables").exists():  # what was tuned is what is timed
            found["FASTLORA_TABLES"] = str(self.out / "tables")
        return found

    def keep(self, part: str, outcome: dict[str, Any]) -> None:
        self.outcomes[part] = outcome
        fresh = self.out / "run.part"
        fresh.write_text(json.dumps(self.outcomes, indent=1))
        fresh.replace(self.out / "run.json")


def _ended(code: int | None) -> str:
    return "out of time" if code is None else "ok" if code == 0 else f"exit code {code}"


def environment(run: Run, seconds: float) -> dict[str, Any]:
    """The machine, its versions and the tools that are there."""
    tools = {name: shutil.which(name) for name in ("nvidia-smi", "ncu", "compute-sanitizer")}
    if tools["nvidia-smi"]:
        run.command("nvidia-smi", seconds=seconds)
    stamp = machine.find(run.device, quick=run.device == "cpu").stamp([])
    return {"state": "ok", **stamp, "tools": tools}


def tests(run: Run, seconds: float) -> dict[str, Any]:
    """The tests that carry the marker gpu; on a CPU their interpreted twins at one rank."""
    if missing := [name for name in ("pytest", "hypothesis") if not _has(name)]:
        return {"state": "skipped", "why": f"{' and '.join(missing)} not installed"}
    which = ["-m", "gpu", "tests"] if run.device == "cuda" else ["-k", "fp32-16", "tests/test_kernels.py"]
    # a worker a core: they compile most of the time
    workers = ["-n", str(os.cpu_count())] if run.device == "cuda" and _has("xdist") else []
    # without tracebacks at the end each failure is said as it comes (conftest.py), so that no time limit hides it
    words = [sys.executable, "-m", "pytest", "-v", "-r", "N", "--tb=no", "-p", "no:cacheprovider", *workers, *which]
    code, text = run.command(*words, seconds=seconds)
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", text)) for word in ("PASSED", "FAILED", "ERROR")}
    state = "no test ran" if code == 0 and not counts["passed"] else _ended(code)
    return {"state": state, **counts}


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def tune(run: Run, seconds: float) -> dict[str, Any]:
    """The offline tuner; a table with what it reached."""
    words = [sys.executable, "-m", "benchmarks.tune", "--device", run.device, "--out", str(run.out / "tables")]
    code, text = run.command(*words, "--seconds", run.own(seconds), seconds=seconds)
    gains = [float(gain) for gain in re.findall(r"^\w+ +row \d+ +([\d.]+)×", text, re.MULTILINE)]
    return {"state": _ended(code), "rows": len(gains), "gains": gains}


def bench(run: Run, seconds: float) -> dict[str, Any]:
    """The suites, an equal share of the time each."""
    words = [sys.executable, "-m", "benchmarks", *SUITES, "--device", run.device, "--out", str(run.out)]
    words += ["--set", "tiny" if run.device == "cpu" else "gpu", "--budget", run.own(seconds)]
    code, _ = run.command(*words, seconds=seconds)
    return {"state": _ended(code), "files": sorted(p.name for p in run.out.glob("*.json") if p.stem in SUITES)}


def sanitize(run: Run, seconds: float) -> dict[str, Any]:
    """memcheck and racecheck over every kernel on a small case; on a CPU a smaller case, bare.

    Both at once, after all was compiled side by side: in turn, what they start and compile would fill the time.
    """
    probe = [sys.executable, "-m", "benchmarks.probe", "--device", run.device]
    if run.device == "cpu":
        code, _ = run.command(*probe, "--size", "tiny", seconds=seconds)
        return {"state": _ended(code), "tool": "none on a CPU"}
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"state": "skipped", "why": "compute-sanitizer is not on PATH"}
    probe += ["--size", "small", "--described", "--unchecked"]
    start = time.monotonic()
    bare, _ = run.command(*probe, "--jobs", str(os.cpu_count() or 2), seconds=seconds / 2)
    left = seconds - (time.monotonic() - start) / run.scale
    checks = {"memcheck": r"ERROR SUMMARY: (\d+)", "racecheck": r"RACECHECK SUMMARY: (\d+)"}
    words = [[tool, "--tool", check, "--error-exitcode", "9", *probe] for check in checks]
    codes, text = run.together(*words, seconds=left)
    found = {}
    for (check, pattern), code in zip(checks.items(), codes, strict=True):
        errors = re.search(pattern, text)
        found[check] = f"{errors[1]} errors" if errors else f"no summary, {_ended(code)}"
    clean = bare == 0 and all(code == 0 and found[check][:2] == "0 " for code, check in zip(codes, found, strict=True))
    return {"state": "ok" if clean else "see run.log", "bare": _ended(bare), **found}


def profile(run: Run, seconds: float) -> dict[str, Any]:
    """DRAM bytes of three kernels beside the ideal ones; on a CPU the ideal ones."""
    size = "large" if run.device == "cuda" else "tiny"
    M, N, K, R = SIZES[size]
    layer = Layer(M, K, N, R, adapter=4)
    ideal = {kernel: getattr(layer, kernel)().bytes for kernel in PROFILED}
    tool = shutil.which("ncu")
    probe = [sys.executable, "-m", "benchmarks.probe", "--device", run.device, "--size", size, "--unchecked", *PROFILED]
    if run.device == "cpu":
        code, _ = run.command(*probe, seconds=seconds)
        return {"state": _ended(code), "tool": "none on a CPU", "ideal_bytes": ideal}
    if tool is None:
        return {"state": "skipped", "why": "ncu is not on PATH", "ideal_bytes": ideal}
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    # the clocks stay as they are: the card is shared with others after us
    words = [tool, "--csv", "--clock-control", "none", "--metrics", metrics, "--kernel-name", OURS, *probe]
    code, text = run.command(*words, seconds=seconds)
    return {"state": _ended(code), "ideal_bytes": ideal, "measured": counters(text)}


UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0}


def counters(text: str) -> list[dict[str, Any]]:
    """ncu's CSV: bytes and seconds of each launch, in order."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
    return list(launches.values())


PARTS: dict[str, Callable[[Run, float], dict[str, Any]]] = {
    "environment": environment,
    "tests": tests,
    "tune": tune,
    "bench": bench,
    "sanitize": sanitize,
    "profile": profile,
}


def _usual(device: str) -> Path:
    """Where the files go unless told: never tiny times over those that are checked in."""
    if device == "cpu":
        return ROOT / "out/gpu"
    return ROOT / "benchmarks/results" / machine.slug(machine.name_of(torch.device(device)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="", help=f"of {' '.join(PARTS)}; all unless given")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu: every part at a tiny size")
    parser.add_argument(
        "--budget", default=str(sum(BUDGETS.values())), help="seconds for all parts, %(default)s unless given"
    )
    parser.add_argument("--out", type=Path, help="$OUT, or benchmarks/results/<device>/, or out/gpu/ of a CPU")
    args = parser.parse_args(argv)
    try:
        chosen = args.parts.split() or list(PARTS)
        if unknown := [part for part in chosen if part not in PARTS]:
            raise BadInput(f"PARTS: got {' '.join(unknown)}, wanted any of {' '.join(PARTS)}")
        if args.device not in ("cuda", "cpu"):
            raise BadInput(f"DEVICE: got {args.device!r}, wanted cuda or cpu")
        if not args.budget.isdecimal() or int(args.budget) == 0:
            raise BadInput(f"BUDGET: got {args.budget!r}, wanted a whole number of seconds ≥ 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise BadInput("DEVICE: got cuda, and torch sees no GPU; DEVICE=cpu runs every part at a tiny size")
        out = Path(args.out or os.environ.get("OUT") or _usual(args.device))
        # a chosen part takes the time of those left out
        run = Run(args.device, out, scale=int(args.budget) / sum(BUDGETS[part] for part in chosen))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    states = []
    for part in PARTS:
        if part not in chosen:
            continue
        start = time.monotonic()
        try:
            outcome = PARTS[part](run, BUDGETS[part])
        except Exception as error:  # the parts after it still have something to tell
            outcome = {"state": f"{type(error).__name__}: {error}"}
        except KeyboardInterrupt:
            outcome = {"state": "interrupted"}
        outcome["seconds"] = round(time.monotonic() - start, 1)
        run.keep(part, outcome)
        states.append(outcome["state"])
        print(f"{part:12}{outcome['seconds']:6.1f} s  {outcome['state']}", flush=True)
        if outcome["state"] == "interrupted":
            break
    print(f"written to {out}")
    return 0 if all(state in ("ok", "skipped") for state in states) else 1


if __name__ == "__main__":
    for ends in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the parts' children are in groups of their own
        if signal.getsignal(ends) is not signal.SIG_IGN:  # as under nohup
            signal.signal(ends, signal.default_int_handler)
    sys.exit(main())
