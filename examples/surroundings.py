"""Where and with what a run was made, for the report beside its figures."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import fastlora

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "rouge-score", "sacrebleu")


def surroundings(device: str) -> dict[str, object]:
    """Device, threads, versions and the commit of the checkout."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "fastlora": fastlora.__version__,
            **{package: version(package) for package in PACKAGES},
        },
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with -dirty if files differ from it; None where there is no git or no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
