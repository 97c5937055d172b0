"""What the numbers must reach on a CPU, and whether a run's records did."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from benchmarks.records import Record

OURS = ("fastlora", "fastlora-patched")
"""Our module, and PEFT's model after `fastlora.patch`."""

Belongs = Callable[[Record], bool]

TARGETS: dict[str, tuple[Belongs, float, float | None]] = {
    "never slower than PEFT": (lambda r: True, 1.00, 1.05),
    "with dropout": (lambda r: r.p > 0, 1 / 1.15, None),
    "with fp32 adapters on a bf16 base": (lambda r: r.dtype == "bf16" and r.adapter_dtype == "fp32", 1 / 1.05, None),
}
"""Beside PEFT: of which records, median, worst   (issue "The measuring bench", §4)."""

MIXED = {"llama 4x512 batch 32x1 distinct 32 r16 qv": 1.35, "llama 4x512 batch 32x16 distinct 32 r16 qv": 1.2}
"""The most that fastlora may take, over the frozen model's time: where an adapter's bytes are 0.5 % of the model's."""


def ratios(records: list[Record], of: str, to: str) -> dict[Record, float]:
    """Time of `of` over time of `to`, for each case that both ran: each over the frozen layer's, where that ran too."""
    others = {(r.suite, r.case, r.pass_): r for r in records if r.impl == to}
    pairs = [
        (r, others[r.suite, r.case, r.pass_]) for r in records if r.impl == of and (r.suite, r.case, r.pass_) in others
    ]
    return {
        r: r.ratio_to_frozen / other.ratio_to_frozen
        if r.ratio_to_frozen and other.ratio_to_frozen
        else r.median_ms / other.median_ms
        for r, other in pairs
    }


def verdicts(records: list[Record]) -> str:
    """Each target, whether this run reached it, and whether each pass alone and the patched model did."""
    found = {impl: ratios(records, impl, "peft") for impl in OURS}
    lines = []
    for name, (belongs, middle, worst) in TARGETS.items():
        of, patched = ({r: ratio for r, ratio in found[impl].items() if belongs(r)} for impl in OURS)
        if not of:
            continue
        wanted = f"median ≤ {middle:.4f}" + (f", worst ≤ {worst:.2f}" if worst else "")
        slow = sorted((r for r in of if worst and of[r] > worst), key=lambda r: -of[r])
        beyond = ["beyond: " + ", ".join(f"{r.case} {r.pass_} {of[r]:.4f}" for r in slow)] if slow else []
        passes = sorted({r.pass_ for r in of}, reverse=True)
        by_pass = {which: [ratio for r, ratio in of.items() if r.pass_ == which] for which in passes}
        parts = [f"{which} {_judged(values, middle, worst)}" for which, values in by_pass.items() if len(passes) > 1]
        parts += [f"patched {_judged([*patched.values()], middle, worst)}"] if patched else []
        lines.append(f"- {name} ({wanted}): " + "; ".join([_judged([*of.values()], middle, worst), *beyond, *parts]))
    return "\n".join(lines)


def _judged(found: list[float], middle: float, worst: float | None) -> str:
    typical, most = median(found), max(found)
    held = typical <= middle and (worst is None or most <= worst)
    return f"{typical:.4f} ({most:.4f}), {'reached' if held else 'not reached'}"


def mixed_verdicts(records: list[Record]) -> str:
    """The targets of a mixed batch of 32 distinct adapters   (issue "Many tenants in one batch", §5)."""
    lines = []
    for case, most in MIXED.items():
        for ratio in (r.ratio_to_frozen for r in records if r.impl == "fastlora" and r.case == case):
            if ratio is not None:
                held = "reached" if ratio <= most else "not reached"
                lines.append(f"- {case}: ≤ {most:.2f} of the frozen model: {ratio:.3f}, {held}")
    return "\n".join(lines)
