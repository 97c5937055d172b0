"""`make adopt`: what it installs of a GPU's run, and what it refuses before anything is touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_compare import STAMP, run_of

from benchmarks import adopt, outcome, records
from benchmarks.records import BadInput
from fastlora_kernels.tables import FOLDER

ROOT = Path(__file__).parents[1]
GPU = {**STAMP, "device": "NVIDIA H200", "slug": "nvidia-h200", "kind": "cuda", "set": "gpu"}
LAUNCH = {"kernel": "_dy_kernel", "dram__bytes_read.sum": 3e6, "dram__bytes_write.sum": 1e6, "gpu__time": 1e-3}
PARTS = {
    "environment": {"state": "ok", "seconds": 3.5, "kind": "cuda", "device": "NVIDIA H200"},
    "tests": {"state": "ok", "seconds": 140.0, "passed": 900, "failed": 0, "log": "x" * 100_000},
    "profile": {
        "state": "ok", "seconds": 20.0, "ideal_bytes": {"dy": 4e6},
        "measured": [LAUNCH, {"kernel": "distribution_elementwise", "dram__bytes_read.sum": 1.0}],
    },
}  # fmt: skip


class Places:
    """A folder as make gpu writes it, and where it is installed."""

    def __init__(self, root: Path) -> None:
        self.source, self.tables, self.results = root / "out", root / "package", root / "results"
        shutil.copytree(FOLDER, self.tables)
        (self.source / "tables").mkdir(parents=True)
        self.table = self.source / "tables" / "sm_90.json"
        self.table.write_text((FOLDER / "sm_90.json").read_text().replace('"num_stages": 3', '"num_stages": 2'))
        for suite in ("linear", "block"):
            records.write(self.source / f"{suite}.json", {**GPU, "suite": suite}, run_of())
        (self.source / "run.json").write_text(json.dumps(PARTS))

    def change(self, name: str, spoil: Callable[[Any], object]) -> None:
        held = json.loads((self.source / name).read_text())
        spoil(held)
        (self.source / name).write_text(json.dumps(held))

    def adopt(self) -> str:
        return adopt.adopt(self.source, self.tables, self.results)

    @property
    def untouched(self) -> bool:
        same = all((self.tables / path.name).read_bytes() == path.read_bytes() for path in FOLDER.glob("*.json"))
        return same and len(list(self.tables.iterdir())) == len(list(FOLDER.iterdir())) and not self.results.exists()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def test_tables_results_and_the_run_are_installed(places: Places) -> None:
    said = places.adopt()
    assert "--- a/sm_90.json" in said and "linear.json: 18 records" in said
    assert adopt.checked(places.tables / "sm_90.json") == json.loads(places.table.read_text())
    device = places.results / "nvidia-h200"
    assert sorted(path.name for path in device.iterdir()) == ["block.json", "linear.json", "run.json"]
    assert (device / "linear.json").read_bytes() == (places.source / "linear.json").read_bytes()
    assert not list(places.tables.glob("*.part"))


def test_of_the_run_only_what_the_report_reads_is_kept(places: Places) -> None:
    places.adopt()
    kept = places.results / "nvidia-h200" / "run.json"
    assert kept.stat().st_size < 1000
    parts = outcome.read_parts(kept)
    assert parts == outcome.read_parts(places.source / "run.json")
    assert parts["tests"] == {"state": "ok", "seconds": 140.0} and outcome.dram_bytes(parts) == {"dy": (4e6, 4e6)}


def test_a_run_without_results_has_no_place_and_its_tables_have(places: Places) -> None:
    for suite in ("linear", "block"):
        (places.source / f"{suite}.json").unlink()
    assert "run.json: left out" in places.adopt()
    assert not places.results.exists() and adopt.checked(places.tables / "sm_90.json")


def stamped(**changes: object) -> Callable[[Any], object]:
    return lambda held: held["stamp"].update(changes)


def tile(**changes: object) -> Callable[[Any], object]:
    return lambda held: held["tiles"]["expand"][0]["tile"].update(changes)


def row(**changes: object) -> Callable[[Any], object]:
    return lambda held: held["tiles"]["expand"][0].update(changes)


@pytest.mark.parametrize("name, spoil, said", [
    ("linear.json", lambda held: held["stamp"].pop("slug"), "slug is None, wanted a folder's name"),
    ("linear.json", stamped(slug="../../etc"), "slug is '../../etc'"),
    ("linear.json", stamped(slug=""), "slug is ''"),
    ("linear.json", stamped(slug="A Machine"), "slug is 'A Machine'"),
    ("linear.json", stamped(slug="nvidia-h100"), "results of nvidia-h100 and nvidia-h200, wanted those of one"),
    ("linear.json", stamped(set="tiny"), "results of the set 'tiny' on cuda, wanted 'gpu' on cuda or 'cpu' on cpu"),
    ("linear.json", stamped(set="gpu", kind="cpu"), "the set 'gpu' on cpu"),
    ("linear.json", stamped(suite="block"), "suite is 'block', wanted 'linear'"),
    ("linear.json", lambda held: held["records"][0].update(median_ms=-1), "median_ms -1, wanted a positive number"),
    ("run.json", lambda held: held["environment"].update(kind="cpu"), "a run on cpu, wanted one on a GPU"),
    ("run.json", lambda held: held["tests"].pop("seconds"), "part tests has state 'ok' and seconds None"),
    ("run.json", lambda held: held["profile"].update(measured=7), "measured int, wanted a list"),
    ("run.json", lambda held: held["profile"].update(ideal_bytes={"dy": 0}), "wanted positive numbers by kernel"),
    ("tables/sm_90.json", tile(BLOCK_M=64.0), "BLOCK_M 64.0, wanted a whole number"),
    ("tables/sm_90.json", tile(num_warps=0), "num_warps 0, wanted a whole number ≥ 1"),
    ("tables/sm_90.json", tile(num_stages=True), "num_stages True, wanted a whole number"),
    ("tables/sm_90.json", tile(tma=1), "tma 1, wanted true or false"),
    ("tables/sm_90.json", row(max_M="64"), "max_M '64', wanted a whole number"),
    ("tables/sm_90.json", row(max_Q=64), "unknown fields ['max_Q']"),
    ("tables/sm_90.json", row(source="stub clock"), "source 'stub clock', wanted one of"),
    ("tables/sm_90.json", lambda held: held["overlap"].update(da="no"), "overlap has da 'no'"),
    ("tables/sm_90.json", lambda held: held["strategy"][0].pop("why"), "not a table"),
])  # fmt: skip
def test_what_is_wrong_is_refused_and_nothing_is_touched(
    name: str, spoil: Callable[[Any], object], said: str, places: Places
) -> None:
    places.change(name, spoil)
    with pytest.raises(BadInput) as refusal:
        places.adopt()
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert places.untouched


def test_a_table_of_no_architecture_is_refused(places: Places) -> None:
    places.table.rename(places.table.with_name("hopper.json"))
    with pytest.raises(BadInput, match="a table of 'hopper', wanted one of default, interpreter, sm_100"):
        places.adopt()
    assert places.untouched


def test_where_a_file_cannot_be_written_none_is(places: Places) -> None:
    places.results.mkdir()
    (places.results / "nvidia-h200").write_text("a file where a folder should be")
    with pytest.raises(BadInput, match="nothing is installed"):
        places.adopt()
    assert (places.tables / "sm_90.json").read_bytes() == (FOLDER / "sm_90.json").read_bytes()
    assert not list(places.tables.glob("*.part"))


@pytest.mark.parametrize("word, said", [("", "FROM: got none, wanted make adopt FROM=DIR"), (".", "FROM: . holds no")])
def test_a_checkout_is_no_run(word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """FROM left out, or the checkout itself, whose own results lie deeper."""
    monkeypatch.chdir(ROOT)
    assert adopt.main([word]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1 and not captured.out


def test_make_adopt_without_from_fails() -> None:
    words = ["make", "--no-print-directory", "-s", "adopt", f"PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: FROM: got none" in done.stderr and not done.stdout
