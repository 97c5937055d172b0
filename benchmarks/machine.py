"""The machine under the numbers: its device and name, the ceilings measured on it, and the stamp of a results file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

import fastlora
from benchmarks.clock import synchronize
from benchmarks.records import BadInput
from benchmarks.shapes import DTYPES

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "peft", "transformers")


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached when measured.   copy_gb_s: read and written, GB/s.   matmul_tflop_s: by dtype."""

    copy_gb_s: float
    matmul_tflop_s: dict[str, float]


@dataclass(frozen=True)
class Machine:
    """A device, its name, what of it may be used, and what it reached.   flush: more bytes than its caches hold."""

    device: torch.device
    name: str
    threads: int
    ceilings: Ceilings
    flush: torch.Tensor

    @property
    def slug(self) -> str:
        return slug(self.name)

    def stamp(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Where, with what, and when: what every results file says of itself."""
        return {
            "device": self.name,
            "kind": self.device.type,
            "driver": _driver() if self.device.type == "cuda" else None,
            "threads": self.threads,
            "ceilings": asdict(self.ceilings),
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in PACKAGES},
                "fastlora": fastlora.__version__,
                "cuda": torch.version.cuda,
            },
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain")),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks", *arguments]),
        }


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def find(kind: str | None, quick: bool) -> Machine:
    """The device of that kind ("cpu", "cuda", or whichever there is), measured.   Raises BadInput if it is not there.

    quick: measure on small operands, for tests, whose ceilings mean little.
    """
    there = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    if kind is not None and kind not in there:
        raise BadInput(f"--device: got {kind!r}, and here there is only {' and '.join(there)}")
    device = torch.device(kind or there[0])
    name = name_of(device)
    flush = torch.ones((2**16 if quick else 2 * _cache_bytes(device)) // 4, device=device)
    return Machine(device, name, torch.get_num_threads(), _ceilings(device, quick), flush)


@contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """This many threads (as many as torch takes by itself where None), on as many cores; as before afterwards."""
    if not hasattr(os, "sched_setaffinity"):
        raise BadInput(f"--device: cannot pin threads on {platform.system()}, wanted Linux")
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    wanted = threads or min(before, len(allowed))
    if not 1 <= wanted <= len(allowed):
        raise BadInput(f"--threads: got {wanted}, wanted 1 to {len(allowed)}, the cores this process may use")
    os.sched_setaffinity(0, sorted(allowed)[:wanted])
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, allowed)


def _ceilings(device: torch.device, quick: bool) -> Ceilings:
    """The best of many: a copy larger than every cache, and square matmuls."""
    size = 2**22 if quick else (2**28 if device.type == "cpu" else 2**30)
    side = 256 if quick else (1024 if device.type == "cpu" else 8192)
    seconds = 0.01 if quick else 0.5
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _best(lambda: target.copy_(source), device, seconds)
    rates = {}
    for dtype in DTYPES if device.type == "cuda" else ("fp32", "bf16"):  # fp16 has no arithmetic on most CPUs
        left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
        rates[dtype] = 2 * side**3 / _best(partial(torch.mm, left, right), device, seconds) / 1e12
    return Ceilings(copied / 1e9, rates)


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run among as many as fit, after one that warms up."""
    times = []
    while len(times) < 4 or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cache_bytes(device: torch.device) -> int:
    """Of the last level: a GPU's L2, a CPU's largest."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


def _cpu_name() -> str:
    """With its vector instructions: processors of one name have AVX2 or AVX512, and bf16 runs 500 times apart."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    if package == "triton":
        return triton.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # a checkout that was copied without its history
    return done.stdout.strip()
