"""The house: imports run one way, `kernels/` is a source root and no package, and the wheel holds what it should."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LADDER = {  # each module or package, and what of ours it may import beside itself
    "reference": set(),
    "eager": {"reference"},
    "ops": {"eager", "reference"},
    "dispatch": {"ops"},
    "checks": {"reference"},
    "functional": {"dispatch", "checks", "ops", "reference"},
    "modules": {"functional", "dispatch", "checks"},
    "trained": {"functional", "checks", "serving"},
    "serving": set(),
    "stacks": set(),
    "multi": {"dispatch", "eager", "ops", "serving", "stacks", "trained"},
    "groups": set(),
    "adapters": {"multi"},
    "virtual": set(),
    "doors": set(),
    "prompts": {"doors", "multi", "serving", "virtual"},
    "nearest": set(),
    "soft": {"adapters", "nearest"},
    "prepend": {"prompts", "soft", "virtual"},
    "runs": set(),
    "attach": {"adapters", "groups", "multi", "ops"},
    "pools": {"adapters", "multi"},
    "storage": {"adapters", "pools", "runs"},
    "jobs": {"adapters", "attach", "doors", "groups", "serving", "trained"},
    "standing": {"dispatch", "multi", "ops"},
    "entry": {"multi", "prompts", "serving", "standing"},
    "bank": {"adapters", "attach", "entry", "multi", "pools", "prompts", "serving", "standing", "storage"},
    "warm": {"dispatch"},
    "peft": {"functional", "checks", "dispatch", "groups", "modules", "ops", "reference"},
    "plan": {"adapters", "functional"},
    "__main__": {"dispatch", "functional", "ops", "plan", "reference"},
    "__init__": {
        "functional",
        "reference",
        "dispatch",
        "modules",
        "multi",
        "prepend",
        "soft",
        "warm",
        "peft",
        "bank",
        "jobs",
    },
}
HEAVY = {"peft", "transformers", "bitsandbytes", "torchao"}
HEAVY_IN = {"peft": HEAVY, "plan": {"transformers"}}
"""Who may import them: the package peft, and plan.py, which builds a model from its config, inside its functions."""


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def place(path: Path) -> str:
    """Its name in the ladder: a file's own, or its package's."""
    return path.relative_to(ROOT / "fastlora").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "fastlora").rglob("*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_imports_run_one_way(path: Path) -> None:
    assert place(path) in LADDER, f"{path.name} has no place in the ladder of this test"
    names = imported(path)
    siblings = {name.split(".")[1] for name in names if name.startswith("fastlora.")}
    assert siblings & LADDER.keys() <= LADDER[place(path)] | {place(path)}
    roots = {name.split(".")[0] for name in names}
    if (place(path), path.stem) != ("ops", "library"):
        assert "fastlora_kernels" not in roots, "ops/library.py is the only importer of the kernels"
    assert roots & HEAVY <= HEAVY_IN.get(place(path), set()), "the package peft is the only importer of them"
    assert "kernels" not in roots


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_only_torch_and_triton(path: Path) -> None:
    ours = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert ours <= {"torch", "triton", "fastlora_kernels"}


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a package of that name breaks transformers"


def test_importing_fastlora_stays_light() -> None:
    code = (
        "import sys, fastlora, fastlora.plan; print(*sorted({'peft', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path, "PATH": ""}
    )
    assert done.stdout.strip() == ""


def test_the_wheel_holds_two_packages_and_their_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "out", ".*_cache")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fastlora_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert top == {"fastlora", "fastlora_kernels"}
    tables = {p.name for p in (ROOT / "kernels/fastlora_kernels/tables").glob("*.json")}
    assert {name.split("/")[-1] for name in names if "/tables/" in name} == tables
    assert {"fastlora/py.typed", "fastlora_kernels/py.typed"} <= set(names)
