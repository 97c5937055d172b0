"""The compile audit's table: complete, current, within every gate, and what the compiler says today.

The tests run beside interpreted kernels, so what compiles does so in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks import audit
from benchmarks.audit_cases import ARCHS, AXES, Case, cases
from fastlora_kernels.tables import Tile, table

ROOT = Path(__file__).parents[1]
WRITE = "python -m benchmarks.audit --write"

pytestmark = pytest.mark.skipif(
    triton.__version__ not in ("3.6.0", "3.7.1"), reason=f"no audit of triton {triton.__version__}: {WRITE} makes one"
)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, ...], audit.Row]:
    return audit.read()[1]


def test_audit_is_current() -> None:
    assert audit.read()[0] == audit.stamp(), f"the kernels or their tiles changed since the audit: run {WRITE}"


def test_every_case_has_a_row(rows: dict[tuple[str, ...], audit.Row]) -> None:
    assert list(rows) == [case.key for case in cases()], f"cases were added or removed: run {WRITE}"


def test_a_table_is_written_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["audit", "--arch", "sm_90", "--write"])
    with pytest.raises(SystemExit, match="2"):
        audit.main()
    assert "--write compiles everything, wanted it without --arch and --kernel" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [kernel for kernel, axes in AXES.items() if axes])
def test_at_least_four_tiles_a_kernel(arch: str, kernel: str) -> None:
    listed = table(arch)["tiles"][kernel]
    assert all(row["source"] in ("predicted", "measured") for row in listed)
    reached = {case.tile for case in cases((arch,), (kernel,))}
    assert reached == {Tile(**row["tile"]) for row in listed}, "a row that no typical launch reaches"
    assert len(reached) >= 4


def test_every_gate_holds(rows: dict[tuple[str, ...], audit.Row]) -> None:
    assert {key: row.verdict for key, row in rows.items() if row.verdict != "pass"} == {}


def test_verdicts_follow_from_the_numbers(rows: dict[tuple[str, ...], audit.Row]) -> None:
    for case in cases():
        assert audit.failures(case, rows[case.key]) == []


def sample() -> list[Case]:
    """bf16 with PEFT's fp32 adapters, at the tile of many rows, both forms: every kernel on sm_90, some elsewhere."""
    wanted = [("sm_90", kernel) for kernel in AXES]
    wanted += [(arch, kernel) for arch in ("sm_80", "sm_100") for kernel in ("expand", "dx")]
    wanted += [("sm_89", "dx"), ("gfx942", "expand")]
    chosen = []
    wanted += [("sm_100", "group_dx"), ("gfx942", "group_shrink")]
    for arch, kernel in wanted:
        of = [c for c in cases((arch,), (kernel,)) if (c.main, c.adapter) == ("bf16", "fp32") or not AXES[kernel]]
        many = [case for case in of if case.rows == max(c.rows for c in of)]
        for tma in sorted({case.tile.tma for case in many}):
            form = [case for case in many if case.tile.tma == tma]
            chosen.append(next((case for case in form if "dropout" in case.flags), form[-1]))
    return chosen


def compiled(wanted: list[Case]) -> list[audit.Row]:
    """Compile the cases in a process of its own."""
    program = (
        "import json, sys\n"
        "from benchmarks.audit import compiled\n"
        "from benchmarks.audit_cases import Case\n"
        "from fastlora_kernels import Tile\n"
        "from dataclasses import asdict\n"
        "wanted = [Case(**{**c, 'tile': Tile(**c['tile'])}) for c in json.load(sys.stdin)]\n"
        "print(json.dumps([asdict(compiled(case)) for case in wanted]))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([dataclasses.asdict(case) for case in wanted]),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return [audit.Row(**row) for row in json.loads(done.stdout)]


def huge() -> list[Case]:
    gemms = [case for case in sample() if case.kernel == "dx" and case.arch in audit.GATED and not case.tile.tma]
    return [dataclasses.replace(case, tile=Tile(256, 256, 64, num_warps=8, num_stages=4)) for case in gemms]


def specialised() -> Case:
    case = next(case for case in sample() if (case.arch, case.kernel, case.tile.tma) == ("sm_90", "dx", True))
    return dataclasses.replace(case, tile=dataclasses.replace(case.tile, specialize=True))


@pytest.fixture(scope="module")
def fresh() -> dict[Case, audit.Row]:
    """What the compiler says today, of all that the next three tests look at."""
    wanted = [*sample(), *huge(), specialised()]
    return dict(zip(wanted, compiled(wanted), strict=True))


def test_compiling_again_gives_the_table(rows: dict[tuple[str, ...], audit.Row], fresh: dict[Case, audit.Row]) -> None:
    for case in sample():
        assert fresh[case] == rows[case.key], case.key


def test_gates_catch_an_oversized_tile(fresh: dict[Case, audit.Row]) -> None:
    """256×256 in 8 warps is 256 accumulators a thread, and four stages of it 256 KiB; on sm_100, 512 columns twice."""
    verdicts = [fresh[case].verdict for case in huge()]
    assert len(verdicts) == 3 and all("FAIL" in verdict for verdict in verdicts)


def test_warps_that_hopper_does_not_specialise_are_caught(fresh: dict[Case, audit.Row]) -> None:
    """On sm_90 Triton 3.6 and 3.7 take `warp_specialize` on the main loop, and compile as if it were not there."""
    assert fresh[specialised()].verdict == "FAIL instruction: wgmma+tma, not specialized"


def test_gates_catch_each_fault() -> None:
    """One sound row, spoilt one number at a time."""
    case = next(case for case in sample() if (case.arch, case.kernel, case.tile.tma) == ("sm_90", "dx", False))
    sound = audit.Row(200, 0, 150_000, 0, 8, "wgmma", 0)
    assert audit.failures(case, sound) == []
    for spoilt in ({"spills": 4}, {"shared": 228 * 1024}, {"tmem": 513}, {"instruction": "mma.sync"}, {"scratch": 1}):
        assert len(audit.failures(case, dataclasses.replace(sound, **spoilt))) == 1  # type: ignore[arg-type]
    described = dataclasses.replace(case, tile=dataclasses.replace(case.tile, tma=True))
    assert audit.failures(described, sound) == ["FAIL instruction: wgmma, not tma"]
    assert audit.failures(described, dataclasses.replace(sound, instruction="wgmma+tma")) == []
    thin = dataclasses.replace(case, kernel="x")
    assert audit.failures(thin, dataclasses.replace(sound, narrow=1)) != []
    assert audit.failures(thin, dataclasses.replace(sound, running=1)) == ["FAIL sums: 1 run on in tensor cores"]
    assert audit.failures(case, dataclasses.replace(sound, running=2)) == []  # the product with w may


def test_compiling_refuses_the_interpreter() -> None:
    from fastlora_kernels import INTERPRET

    if not INTERPRET:
        pytest.skip("the kernels are compiled in this run")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        audit.compiled(sample()[0])
