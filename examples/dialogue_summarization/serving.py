"""What an adapter costs once it is trained: merged, it is gone; unmerged, it is swapped for another in place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measures
import torch
from lab import Lab
from multi_tenant import turns
from peft import PeftModel

import fastlora

SWITCHES = 20
REQUESTS, NEW_TOKENS = 8, 16
"""Of the batch that is timed."""


def serving(lab: Lab, summary: Path, second: Path, task: str, rounds: int) -> dict[str, Any]:
    """summary, second: folders of two adapters of the lab's base, the second's task."""
    plain = PeftModel.from_pretrained(lab.open(), summary, adapter_name="summary")
    merged = PeftModel.from_pretrained(lab.open(), summary).merge_and_unload().eval()
    fused: Any = PeftModel.from_pretrained(lab.open(), summary, adapter_name="summary")
    fused.load_adapter(second, "second")
    fastlora.patch(fused, strict=True)
    found: dict[str, Any] = {"task": task, "swaps": swaps(lab, fused)}
    judges = {"summary": lab.judge("summary"), "second": lab.judge(task)}
    found["answers"] = {}
    for adapter in judges:
        fused.set_adapter(adapter)
        for name, judge in judges.items():
            said = measures.written(judge, fused)
            rouge = judge.rouge(said)["rougeL"]
            exact = sum(map(str.__eq__, said, judge.references))
            found["answers"][f"{adapter} asked for {name}"] = {"rougeL": statistics.mean(rouge), "exact": exact}
    fused.set_adapter("summary")
    judge = judges["summary"]
    tokens = [judge.write(model) for model in (fused, merged)]
    found["same_tokens"] = {"merged": sum(map(list.__eq__, *tokens)), "of": len(tokens[0])}
    models = {"base": lab.open(), "merged": merged, "LoRA, PEFT": plain.eval(), "LoRA, fastlora": fused.eval()}
    found["latency"] = latency(lab, models, rounds)
    return found


def swaps(lab: Lab, model: Any) -> dict[str, Any]:
    """Switching between both adapters and the base, back and forth: to the bit what each was before; and how long."""
    first: dict[str, Any] = {}
    seconds, exact = [], True
    for turn in range(SWITCHES):
        name = ("summary", "second")[turn % 2]
        start = time.perf_counter()
        model.set_adapter(name)
        seconds.append(time.perf_counter() - start)
        logits = lab.logits(model)
        exact = exact and torch.equal(first.setdefault(name, logits), logits)
    with model.disable_adapter():
        base = torch.equal(lab.logits(model), lab.base_logits)
    return {
        "switches": SWITCHES,
        "exact": exact,
        "differ": not torch.equal(first["summary"], first["second"]),
        "base_exact": base,
        "milliseconds": 1e3 * statistics.median(seconds),
    }


def latency(lab: Lab, models: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of the same greedy tokens from the same prompts, interleaved; and of each turn over the base's.

    On a CPU the processor's, which know nothing of other jobs.
    """
    prompts = lab.prompts(REQUESTS)

    def side(model: Any) -> Callable[[], Any]:
        options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=lab.pad)
        return lambda: model.generate(**prompts, **options)

    clock = time.process_time if lab.device == "cpu" else time.perf_counter
    times = turns({name: side(model) for name, model in models.items()}, rounds, clock)
    found = {}
    for name, each in times.items():
        ratios = sorted(mine / base for mine, base in zip(each, times["base"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ms": 1e3 * statistics.median(each),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
        }
    return found
