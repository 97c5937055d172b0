"""Verdicts on made-up records with known answers: a CPU's beside PEFT, an H200's targets, and what is not timed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_compare import BASE, STAMP, run_of, written

from benchmarks import __main__ as cli
from benchmarks import gpu_verdicts, report
from benchmarks.records import Record, Results
from benchmarks.verdicts import verdicts


def test_report_says_where_a_target_is_missed() -> None:
    found = run_of()
    at = next(i for i, r in enumerate(found) if (r.impl, r.M, r.R) == ("fastlora", 16, 8))
    before = found[at]
    found[at] = replace(before, median_ms=before.median_ms * 2, ratio_to_frozen=before.ratio_to_frozen * 2)
    assert "0.8000 (1.6000), not reached; beyond: q M16 r8 forward 1.6000" in verdicts(found)


def test_a_target_missed_by_little_is_missed() -> None:
    def as_slow(record: Record, by: float) -> Record:
        return replace(record, ratio_to_frozen=by) if record.impl in ("fastlora", "peft") else record

    even = [as_slow(r, 1.004 if r.impl == "fastlora" else 1.0) for r in run_of()]
    assert "1.0040 (1.0040), not reached" in verdicts(even)
    assert "1.0000 (1.0000), reached" in verdicts([as_slow(r, 1.0) for r in even])


def test_each_pass_and_the_patched_model_have_a_verdict_of_their_own() -> None:
    """Forward makes up for backward in the median of both; the module does not speak for the patched model."""
    found = []
    for number, (pass_, p) in enumerate(itertools.product(("forward", "both"), (0.1,) * 3)):
        times = {"frozen": 1.0, "peft": 2.0, "fastlora": 1.2 if pass_ == "forward" else 1.9, "fastlora-patched": 1.9}
        case = dict(case=f"case {number}", pass_=pass_, p=p)
        found += [replace(BASE, **case, impl=impl, ratio_to_frozen=ratio) for impl, ratio in times.items()]
    (line,) = [line for line in verdicts(found).splitlines() if line.startswith("- with dropout")]
    assert line == (
        "- with dropout (median ≤ 0.8696): 0.7750 (0.9500), reached; forward 0.6000 (0.6000), reached; "
        "both 0.9500 (0.9500), not reached; patched 0.9500 (0.9500), not reached"
    )


def test_refusals_are_in_the_section_and_those_of_one_reason_are_one_line() -> None:
    refused = [
        "llama.q M8 p0 fastlora: da: error 1e-05",
        "llama.q M8 p0 fastlora-patched: da: error 1e-05",
        "llama.q M8 p0 fastlora-patched: da: error 1e-05",
        "llama.k M8 p0 fastlora: da: error 1e-05",
        "llama.k M8 p0 peft: OutOfMemoryError: no room",
    ]
    text = report.section(Results({**STAMP, "refused": refused}, run_of()), [])
    assert text.endswith(
        "Refused by the gate, and so not timed:\n\n"
        "- llama.q M8 p0 fastlora, fastlora-patched, llama.k M8 p0 fastlora: `da: error 1e-05`\n"
        "- llama.k M8 p0 peft: `OutOfMemoryError: no room`"
    )
    assert "Refused" not in report.section(Results(STAMP, run_of()), [])


def test_who_was_timed_without_a_graph_is_in_the_section() -> None:
    eager = [f"llama batch 64x{tokens} peft forward: it picks rows by lists" for tokens in (1, 128)]
    text = report.section(Results({**STAMP, "suite": "multi", "eager": eager}, run_of()), [])
    assert text.endswith(
        "Timed as it runs, launch by launch from the host, and the others as CUDA graphs: no graph holds:\n\n"
        "- llama batch 64x1 peft forward, 64x128 peft forward: `it picks rows by lists`"
    )
    assert "graph" not in report.section(Results({**STAMP, "suite": "multi", "eager": []}, run_of()), [])


SIZES = {
    "q": (4096, 4096),
    "k": (4096, 1024),
    "gate": (4096, 14336),
    "down": (14336, 4096),
    "qkv": (0, 0),
    "mlp": (0, 0),
}
TIMES = {
    "frozen": 1.0, "fastlora": 1.02, "fastlora-patched": 1.3, "peft": 1.6, "peft-compiled": 1.3, "unsloth-style": 1.2,
}  # fmt: skip


def reached(**changes: Any) -> list[Record]:
    """Every record that the targets ask for, all of them reached by fastlora."""
    found = []
    for suite, shapes in gpu_verdicts.SHAPES.items():
        for shape, p, pass_, (impl, ratio) in itertools.product(shapes, (0.0, 0.1), ("forward", "both"), TIMES.items()):
            K, N = SIZES[shape]
            case = f"llama-3-8b.{shape} M8192 r16 bf16+fp32 p{p:g}"
            sizes = dict(M=8192, K=K, N=N, R=16, dtype="bf16", p=p, median_ms=ratio, ratio_to_frozen=ratio)
            found.append(replace(BASE, suite=suite, case=case, pass_=pass_, impl=impl, **sizes))
    return found


def judged(found: list[Record], dram: dict[str, tuple[float, float]] | None = None) -> dict[tuple[str, str, str], Any]:
    """(values, verdict, the patched model's) by (target, pass, p)."""
    ceilings = {"copy_gb_s": 4000.0, "matmul_tflop_s": {"bf16": 750.0}}
    runs = [
        Results({**STAMP, "suite": suite, "ceilings": ceilings}, [r for r in found if r.suite == suite])
        for suite in ("linear", "block")
    ]
    return {tuple(row[:3]): tuple(row[3:]) for row in gpu_verdicts.rows(runs, dram or {})}


def changed(found: list[Record], which: dict[str, Any], **values: Any) -> list[Record]:
    def chosen(r: Record) -> bool:
        return all(value in r.case if name == "case" else getattr(r, name) == value for name, value in which.items())

    return [replace(r, **values) if chosen(r) else r for r in found]


def test_all_targets_reached() -> None:
    dram = {name: (1.2, 1.0) for name in ("expand", "dx", "dy")}
    found = judged(reached(), dram)
    assert {key for key, (_, verdict, _) in found.items() if verdict != "reached"} == set()
    assert len(found) == 2 * (2 + 2 + 9) + 1
    together = [found[key] for key in found if key[0].startswith("q, k, v and MLP")]
    assert all(values == ("together 1.020", "reached", "missed") for values in together) and len(together) == 4


def test_a_linears_allowance_is_what_the_design_allows() -> None:
    """1.15 × 2·M·K bytes at 4 TB/s and 3 µs: 22.3 µs for K = 4096, on a frozen layer of 1 ms."""
    key = ("each linear within its allowance", "forward", "0")
    for ratio, verdict in ((1.0222, "reached"), (1.0224, "missed")):
        found = judged(
            changed(reached(), {"impl": "fastlora", "case": ".q ", "suite": "linear"}, ratio_to_frozen=ratio)
        )
        assert found[key][1] == verdict and f"q {ratio:.3f} of 1.022" in found[key][0]
    both = judged(reached())["each linear within its allowance", "both", "0"]
    assert both[0].split(", ")[1] == "k 1.020 of 1.052", "1.15 × (4·K + 2·N)·M / 4 TB/s and 9 µs"


@pytest.mark.parametrize("which, values, key", [
    ({"impl": "peft", "suite": "linear"}, 1.3, ("linear: ≥ 1.4× PEFT", "forward", "0")),
    ({"impl": "peft-compiled", "suite": "linear"}, 1.1, ("linear: ≥ 1.2× PEFT compiled", "both", "> 0")),
    ({"impl": "peft", "suite": "block"}, 1.5, ("block: ≥ 1.5× PEFT", "both", "> 0")),
    ({"impl": "unsloth-style", "suite": "block"}, 1.1, ("block: ≥ 1.15× unsloth-style", "both", "0")),
    ({"impl": "fastlora", "suite": "block", "case": ".mlp ", "p": 0.1}, 1.07,
     ("q, k, v and MLP together ≤ 1.04× frozen", "forward", "> 0")),
])  # fmt: skip
def test_a_missed_target_is_missed(which: dict[str, Any], values: float, key: tuple[str, str, str]) -> None:
    assert judged(changed(reached(), which, ratio_to_frozen=values))[key][1] == "missed"


def test_dropout_is_judged_apart() -> None:
    found = judged(changed(reached(), {"impl": "fastlora", "p": 0.1}, ratio_to_frozen=1.2))
    assert found["linear: ≥ 1.4× PEFT", "both", "0"][1] == "reached"
    assert found["linear: ≥ 1.4× PEFT", "both", "> 0"][1] == "missed"


def test_what_was_refused_or_did_not_run_is_not_timed() -> None:
    refused = [r for r in reached() if not (r.impl == "fastlora" and r.case.startswith("llama-3-8b.k "))]
    found = judged(refused)["each linear within its allowance", "forward", "0"]
    assert found[1] == "not timed: k" and found[0].startswith("q 1.020 of")
    absent = [r for r in reached() if not r.case.startswith(("llama-3-8b.down ", "llama-3-8b.mlp "))]
    assert judged(absent)["linear: ≥ 1.4× PEFT", "both", "0"][1] == "not timed: down"
    assert judged(absent)["q, k, v and MLP together ≤ 1.04× frozen", "forward", "0"] == (
        "qkv alone 1.020", "not timed: mlp", "not timed: mlp"
    )  # fmt: skip
    elsewhere = [replace(r, M=4096) for r in reached()]
    assert {row[1] for row in judged(elsewhere).values()} == {"not timed"} == {row[1] for row in judged([]).values()}


def test_dram_bytes_have_a_verdict() -> None:
    key = (f"DRAM bytes ≤ {gpu_verdicts.DRAM}× ideal", "–", "–")
    enough = {"expand": (1.2, 1.0), "dx": (1.0, 1.0)}
    assert judged([], enough)[key][:2] == ("expand 1.20, dx 1.00", "not timed: dy")
    assert judged([], {**enough, "dy": (1.3, 1.0)})[key][1] == "missed"


def test_a_gpus_section_ends_with_its_targets(tmp_path: Path) -> None:
    linear = [r for r in reached() if r.suite == "linear"]
    written(tmp_path / "results" / "h200", linear, kind="cuda")
    page = tmp_path / "page.md"
    assert cli.main(["report", "--results", str(tmp_path / "results"), "--out", str(page)]) == 0
    text = page.read_text()
    row = "| linear: ≥ 1.4× PEFT | both | 0 | q 1.57, k 1.57, gate 1.57, down 1.57 | reached |"
    assert row in text[text.index("### targets") :]
