"""What `make gpu` left in run.json, as far as the report says it: each part's end, and DRAM bytes by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.records import BadInput, loaded, number, positive

MOVED = ("dram__bytes_read.sum", "dram__bytes_write.sum")
GEMMS = ("_expand_kernel", "_persistent_kernel")
"""The kernels of expand and of dx, which are one GEMM in two forms: the profiler sees expand first."""
DY = "_dy_kernel"


def read_parts(path: Path) -> dict[str, Any]:
    """Of each part its state and seconds, and of `profile` what it measured.   Raises BadInput for any other file."""
    held = loaded(path)
    if not isinstance(held, dict) or not all(isinstance(part, dict) for part in held.values()):
        raise BadInput(f"{path}: got {type(held).__name__}, wanted the parts of make gpu by name")
    parts = {}
    for name, part in held.items():
        if not isinstance(part.get("state"), str) or not number(part.get("seconds")):
            raise BadInput(f"{path}: part {name} has state {part.get('state')!r} and seconds {part.get('seconds')!r}")
        parts[name] = {"state": part["state"], "seconds": part["seconds"]}
    profile = held.get("profile", {})
    if "measured" in profile:
        parts["profile"] |= {"ideal_bytes": _ideal(path, profile), "measured": _launches(path, profile["measured"])}
    return parts


def _ideal(path: Path, profile: dict[str, Any]) -> dict[str, float]:
    ideal = profile.get("ideal_bytes")
    if not isinstance(ideal, dict) or not all(positive(value) for value in ideal.values()):
        raise BadInput(f"{path}: profile has ideal_bytes {ideal!r}, wanted positive numbers by kernel")
    return ideal


def _launches(path: Path, measured: Any) -> list[dict[str, Any]]:
    """The launches of ours with both counts; a profiler that ran out of time leaves some without."""
    if not isinstance(measured, list) or not all(isinstance(launch, dict) for launch in measured):
        raise BadInput(f"{path}: profile has measured {type(measured).__name__}, wanted a list of launches")
    found = []
    for launch in measured:
        name = str(launch.get("kernel")).split("(")[0]
        if name in (*GEMMS, DY) and all(number(launch.get(count)) for count in MOVED):
            found.append({"kernel": name, **{count: launch[count] for count in MOVED}})
    return found


def dram_bytes(parts: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(moved, ideal) bytes of expand, dx and dy: of each its first launch, told by the kernel's name."""
    profile = parts.get("profile", {})
    launches = [(m["kernel"], sum(m[count] for count in MOVED)) for m in profile.get("measured", [])]
    gemms, dys = ([moved for kernel, moved in launches if kernel in names] for names in (GEMMS, (DY,)))
    found = [*zip(("expand", "dx"), gemms, strict=False), *zip(("dy",), dys, strict=False)]
    ideal = profile.get("ideal_bytes", {})
    return {name: (moved, ideal[name]) for name, moved in found if name in ideal}
