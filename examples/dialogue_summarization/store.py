"""What a run has on disk: a folder for each finished cell, which appears whole or not at all, and their settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, **layout: Any) -> None:
    """The file is there with all of it, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, ensure_ascii=False, **layout) + "\n", "utf-8")
    os.replace(part, path)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill under another name; it takes its own when all went well."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Begin a run in `out`, or take one up.   Raises ValueError where one of other settings lies there."""
    path = out / "settings.json"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        for key in sorted(settings.keys() | found.keys()):
            if found.get(key) != settings.get(key):
                raise ValueError(
                    f"--out: {out} holds a run with {key} = {found.get(key)}, wanted {settings.get(key)}; "
                    "choose another folder, or remove that one"
                )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} holds other files, wanted an empty folder or a run of the lab's")
    write_json(path, settings, indent=1)


def result(folder: Path) -> dict[str, Any] | None:
    """What a finished cell found."""
    path = folder / "result.json"
    found: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return found
