"""What an H200 must reach on Llama-3-8B's layers, M = 8192, r = 16, bf16, and whether a run's records did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.records import Record, Results
from benchmarks.verdicts import OURS, ratios

MODEL, M, R = "llama-3-8b", 8192, 16
SHAPES = {"linear": ("q", "k", "gate", "down"), "block": ("qkv", "mlp")}
"""Of each suite; o is of q's size, v of k's, up of gate's."""

SLACK, LAUNCH_MS = 1.15, 3e-3
LAUNCHES = {"forward": 1, "both": 3}
"""Beside the frozen layer's, a launch for each big tensor read again: shrink, dy pass, x pass; their sums get none."""

TOGETHER = {"forward": 1.04, "both": 1.06}
DRAM = 1.2
FASTER = (
    ("linear", "peft", {"forward": 1.4, "both": 1.4}),
    ("linear", "peft-compiled", {"forward": 1.2, "both": 1.2}),
    ("block", "peft", {"forward": 1.4, "both": 1.5}),
    ("block", "peft-compiled", {"forward": 1.2, "both": 1.2}),
    ("block", "unsloth-style", {"both": 1.15}),
)
"""How many times as fast as whom, by pass   (issues "The measuring bench", §4, "Whole groups and many jobs", §5)."""

NAMES = {"peft": "PEFT", "peft-compiled": "PEFT compiled", "unsloth-style": "unsloth-style"}

INTRO = f"""Of an H200: Llama-3-8B, M = {M}, r = {R}, bf16 base, fp32 adapters unless bf16 is said. A linear's allowance
over the frozen layer is {SLACK} × the bytes read again (2·M·K forward, 4·M·K + 2·M·N both ways) at the measured copy
bandwidth, and 3 µs for each launch that reads them ({LAUNCHES["forward"]} forward, {LAUNCHES["both"]} both ways).
Every case must hold; a case that ran without ours, and a shape that did not run, is not timed."""


@dataclass
class Found:
    """One target in one run.   said: a value of each case.   held: whether each holds.   missing: what has no time."""

    said: list[str] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        absent = f"not timed: {', '.join(self.missing)}" if self.missing and self.said else "not timed"
        if not all(self.held):
            return f"missed; {absent}" if self.missing else "missed"
        return "reached" if self.held and not self.missing else absent


def rows(runs: list[Results], dram: dict[str, tuple[float, float]]) -> Iterator[list[str]]:
    """[target, pass, p, values, verdict, verdict of the patched model] of each target."""
    records = [r for run in runs for r in run.records if _central(r)]
    copy = {run.stamp["suite"]: run.stamp["ceilings"]["copy_gb_s"] for run in runs}
    for which in LAUNCHES:
        for drops in (False, True):
            found = [_linears(records, impl, which, drops, copy) for impl in OURS]
            yield _row("each linear within its allowance", which, drops, found)
    for which, most in TOGETHER.items():
        for drops in (False, True):
            found = [_together(records, impl, which, drops, most) for impl in OURS]
            yield _row(f"q, k, v and MLP together ≤ {most}× frozen", which, drops, found)
    for suite, peer, factors in FASTER:
        for which, least in factors.items():
            for drops in (False, True):
                found = [_faster(records, impl, suite, peer, which, drops, least) for impl in OURS]
                yield _row(f"{suite}: ≥ {least}× {NAMES[peer]}", which, drops, found)
    said = [f"{kernel} {moved / ideal:.2f}" for kernel, (moved, ideal) in dram.items()]
    missing = [kernel for kernel in ("expand", "dx", "dy") if kernel not in dram]
    moved = Found(said, [moved <= DRAM * ideal for moved, ideal in dram.values()], missing)
    yield [f"DRAM bytes ≤ {DRAM}× ideal", "–", "–", ", ".join(said) or "–", moved.verdict, "–"]


def _row(name: str, which: str, drops: bool, found: list[Found]) -> list[str]:
    ours, patched = found
    return [name, which, "> 0" if drops else "0", ", ".join(ours.said) or "–", ours.verdict, patched.verdict]


def _central(r: Record) -> bool:
    return r.case.startswith(f"{MODEL}.") and (r.M, r.R, r.dtype) == (M, R, "bf16")


def _shape(r: Record) -> str:
    return r.case.split()[0].removeprefix(f"{MODEL}.")


def _label(r: Record) -> str:
    return _shape(r) + (" bf16" if r.adapter_dtype == "bf16" else "")


def _of(records: list[Record], suite: str, impl: str, which: str, drops: bool) -> dict[str, Record]:
    """The records of `impl`, by case."""
    return {r.case: r for r in records if (r.suite, r.impl, r.pass_) == (suite, impl, which) and (r.p > 0) == drops}


def _missing(suite: str, peers: dict[str, Record], ours: dict[str, Record]) -> list[str]:
    """What the peer ran and `ours` did not, and the shapes that the peer did not run."""
    ran = {_shape(r) for r in peers.values()}
    unmet = [_label(r) for case, r in peers.items() if case not in ours]
    return list(dict.fromkeys([*unmet, *(shape for shape in SHAPES[suite] if shape not in ran)]))


def _linears(records: list[Record], impl: str, which: str, drops: bool, copy_gb_s: dict[str, float]) -> Found:
    frozen, ours = (_of(records, "linear", name, which, drops) for name in ("frozen", impl))
    found = Found(missing=_missing("linear", frozen, ours))
    for case, r in ours.items():
        if case in frozen and r.ratio_to_frozen is not None:
            again = 2 * M * r.K if which == "forward" else 4 * M * r.K + 2 * M * r.N
            extra_ms = SLACK * again / (copy_gb_s["linear"] * 1e6) + LAUNCHES[which] * LAUNCH_MS
            allowed = 1 + extra_ms / frozen[case].median_ms
            found.said.append(f"{_label(r)} {r.ratio_to_frozen:.3f} of {allowed:.3f}")
            found.held.append(r.ratio_to_frozen <= allowed)
    return found


def _together(records: list[Record], impl: str, which: str, drops: bool, most: float) -> Found:
    """q, k, v and the gated MLP, summed for each dtype of adapters that was run."""
    frozen, ours = (_of(records, "block", name, which, drops) for name in ("frozen", impl))
    found = Found(missing=[] if frozen else [*SHAPES["block"]])
    for dtype in sorted({r.adapter_dtype for r in frozen.values()}, reverse=True):
        mark = " bf16" if dtype == "bf16" else ""
        times = {  # ours over the frozen block's of the same rounds, times that block's median
            _shape(r): (r.ratio_to_frozen * frozen[case].median_ms, frozen[case].median_ms)
            for case, r in ours.items()
            if case in frozen and r.ratio_to_frozen is not None and r.adapter_dtype == dtype
        }
        found.missing += [f"{shape}{mark}" for shape in SHAPES["block"] if shape not in times]
        if set(times) == set(SHAPES["block"]):
            taken, floor = (sum(column) for column in zip(*times.values(), strict=True))
            found.said.append(f"together{mark} {taken / floor:.3f}")
            found.held.append(taken <= most * floor)
        else:
            found.said += [f"{shape}{mark} alone {taken / floor:.3f}" for shape, (taken, floor) in times.items()]
    return found


def _faster(records: list[Record], impl: str, suite: str, peer: str, which: str, drops: bool, least: float) -> Found:
    peers, ours = (_of(records, suite, name, which, drops) for name in (peer, impl))
    found = Found(missing=_missing(suite, peers, ours))
    for r, ratio in ratios([*peers.values(), *ours.values()], impl, peer).items():
        found.said.append(f"{_label(r)} {1 / ratio:.2f}")
        found.held.append(1 / ratio >= least)
    return found
