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
from torch.nn.functional import linear

import fastlora
from benchmarks.records import BadInput
from benchmarks.shapes import DTYPES

ROOT = Path(__file__).parents[1]
CPU_PRODUCTS = [(512, 1024, 1024), (512, 1024, 2048)]
GPU_PRODUCTS = [(8192, 4096, 4096), (8192, 4096, 14336)]
"""(M, K, N) of the matmuls whose best is the ceiling."""

TURNS = {"cpu": 8, "cuda": 3}
BURST = 0.03
"""Seconds for which each of the ceilings' probes goes on in a turn."""

QUEUED = 4
"""Calls that a GPU is timed over at once: while one runs the next is launched."""

PACKAGES = ("torch", "triton", "peft", "transformers")


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached at best when measured.

    copy_gb_s: bytes read and written, or read alone where that is faster, GB/s.   matmul_tflop_s: by dtype.
    """

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
            "command": " ".join(["python -m benchmarks", *_elsewhere(arguments)]),
        }


def _elsewhere(arguments: Sequence[str]) -> list[str]:
    """What to type on another machine: without the folder that the results went to on this one."""
    kept = [argument for argument in arguments if not argument.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return kept


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
    """This many threads (as many as torch takes by itself where None) on as many cores; as before afterwards.

    The process is held to those cores; which thread runs on which of them is the system's choice.
    """
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
    """The best of many short bursts, all taken in turns, and after each a rest as long.

    Of bytes a copy and a plain read, each larger than every cache; of FLOPs products of the cases' own sizes, with w
    and with wᵀ, as forward and backward have them. One half-second of squares was no ceiling: an H200 that multiplied
    8192³ without a rest stayed 6 % below what its cases, which rest in between, then reached; and a CPU that others use
    too changes its speed (the frozen layer of one case ran 23 % faster than the same product in the case before).
    """
    cpu = device.type == "cpu"
    size = 2**22 if quick else (2**28 if cpu else 2**30)
    shapes = [(64, 64, 64)] if quick else (CPU_PRODUCTS if cpu else GPU_PRODUCTS)
    source = torch.randn(size // 4, device=device)
    probes: list[tuple[str, int, Callable[[], Any]]] = [
        ("bytes", 2 * size, partial(torch.empty_like(source).copy_, source)),
        ("bytes", size, source.sum),
    ]
    for dtype in ("fp32", "bf16") if cpu else DTYPES:  # fp16 has no arithmetic on most CPUs
        for M, K, N in shapes:
            x, w, dy = (torch.randn(*s, device=device).to(DTYPES[dtype]) for s in ((M, K), (N, K), (M, N)))
            probes += [(dtype, 2 * M * K * N, partial(linear, x, w)), (dtype, 2 * M * K * N, partial(torch.mm, dy, w))]
    rates = dict.fromkeys((what for what, _, _ in probes), 0.0)
    slow: set[int] = set()
    for _ in range(2 if quick else TURNS[device.type]):
        for index, (what, amount, run) in enumerate(probes):
            if index in slow:
                continue
            start = time.perf_counter()
            rates[what] = max(rates[what], amount / _best(run, device, 0.0 if quick else BURST))
            taken = time.perf_counter() - start
            if taken > 20 * BURST:  # 16 bits on a CPU without them: one turn is all the time that they are worth
                slow.add(index)
            time.sleep(0.0 if quick else min(taken, BURST))
    return Ceilings(rates.pop("bytes") / 1e9, {dtype: rate / 1e12 for dtype, rate in rates.items()})


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call among as many as fit, one at the least; a GPU's by its own clock."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(QUEUED):
                run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3 / QUEUED)
        else:
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
    return min(times)


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
    if package == "torch":  # with its build, which the package's own metadata may leave out
        return str(torch.__version__)
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
