"""Every suite's gate: whoever is wrong is refused and not timed, and the floor's own error is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import base_model
from peft import PeftModel
from test_bank_launches import Recorded

from benchmarks import block, groups, multi, records, step
from benchmarks.__main__ import main
from benchmarks.layers import FLOOR
from benchmarks.records import Results
from fastlora import AdapterBank
from fastlora.standing import Standing

QUICK = ["--device", "cpu", "--set", "tiny", "--rounds", "2", "--threads", "1", "--impl", "fastlora"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race that ends with its rounds."""
    monkeypatch.setattr("benchmarks.clock.SETTLED", 0.0)


def results(suite: str, out: Path, code: int) -> Results:
    assert main([suite, *QUICK, "--out", str(out)]) == code
    return records.read(out / f"{suite}.json")


def refuses(suite: str, out: Path) -> list[str]:
    """What the suite refuses; nothing but the floor is timed."""
    found = results(suite, out, 1)
    assert {r.impl for r in found.records} == {FLOOR}
    return found.stamp["refused"]


def one_percent_off(made: Any) -> Any:
    """A block's implementation whose updates are one percent too large."""
    return lambda t, p: made(replace(t, scale=t.scale * 1.01), p)


def test_block_refuses_a_wrong_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(groups.IMPLS, "fastlora", one_percent_off(groups.ours))
    refused = refuses("block", tmp_path)
    assert len(refused) == 2 and all(" fastlora: " in line and ": error " in line for line in refused)


def test_blocks_floor_is_measured_and_gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = [r for r in results("block", tmp_path, 0).records if r.impl == FLOOR]
    assert floors and all(r.rel_error and 1e-9 < r.rel_error < 1e-5 for r in floors), "roundings, never none"
    monkeypatch.setitem(
        groups.IMPLS, FLOOR, lambda t, p: lambda: t.through(lambda i, x: torch.nn.functional.linear(x, t.ws[i] * 1.01))
    )
    found = results("block", tmp_path, 1)
    assert {r.impl for r in found.records} == {"fastlora"}
    assert [" frozen: " in line for line in found.stamp["refused"]] == [True, True]


def test_step_refuses_a_wrong_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = step.SIDES["fastlora"]

    def wrong(model: PeftModel) -> None:
        patched(model)
        for name, layer in model.named_modules():
            if name.endswith("q_proj"):
                layer.scaling["default"] = 2.02

    monkeypatch.setitem(step.SIDES, "fastlora", wrong)
    refused = refuses("step", tmp_path)
    assert len(refused) == 2 and all(" fastlora: " in line and "error" in line for line in refused)


def test_step_refuses_a_model_that_is_wrong_for_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes is gated, too: few rows run on a path of their own."""
    patched = step.SIDES["fastlora"]

    def off(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            output.logits.mul_(1.01)

    def wrong(model: PeftModel) -> None:
        patched(model)
        model.register_forward_hook(off, with_kwargs=True)

    monkeypatch.setitem(step.SIDES, "fastlora", wrong)
    refused = refuses("step", tmp_path)
    assert len(refused) == 2 and all(" fastlora: decoded: " in line for line in refused), refused


def test_multi_refuses_a_wrong_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = multi._bank

    def wrong(model: Any, states: Any, case: Any) -> Any:
        run = bank(model, states, case)
        return lambda tokens: run(tokens) * 1.01

    monkeypatch.setattr(multi, "_bank", wrong)
    (refused,) = refuses("multi", tmp_path)
    assert " fastlora: logits: error " in refused


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_captured_step_of_multi_is_the_step(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes a mask while a graph is captured, and else none: it would be timed with every side."""
    case = multi.Case(multi.SIZES["tiny"], "fp32", tokens, 2, (4,))
    cpu = torch.device("cpu")
    model, states = multi._model(case, cpu), [multi._state(case, index, cpu) for index in range(2)]
    ids = torch.zeros(case.size.requests, tokens, dtype=torch.long)
    for make in (multi._frozen, multi._gathered, multi._bank):
        run, done = make(model, states, case), []
        run(ids)
        for captures in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captures=captures: captures)
            with Recorded() as recorded:
                run(ids)
            done.append(recorded.names)
        assert done[0] == done[1] and "aten::_local_scalar_dense" not in done[0]


def test_a_replayed_step_of_multi_routes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is looked up in every step, as a graph's replay does, and not taken back in the same."""
    looked = []
    look = Standing.look
    monkeypatch.setattr(Standing, "look", lambda self: (looked.append(1), look(self)))
    base = base_model(layers=1)
    bank = AdapterBank(base, max_loras=1, max_total_rank=4)
    mapping = torch.zeros(2, dtype=torch.int32)
    run = multi._replayed(bank, mapping, lambda ids: base(input_ids=ids).logits)
    ids = torch.zeros(2, 1, dtype=torch.long)
    run(ids)
    looked.clear()
    run(ids)
    assert len(looked) == 1
    bank.prepare(None)


@pytest.mark.parametrize("make, case", [
    (multi._model, multi.Case(multi.SIZES["tiny"], "fp32", 1, 1)),
    (step._model, step.Case(step.SIZES["tiny"][0], "fp32", "fp32", 0.0)),
])  # fmt: skip
def test_a_models_weights_are_drawn_where_it_lies(make: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU draws 436 million in five to ten seconds, in each case anew; a suite has 25 of a GPU's time."""
    drawn = []
    init = torch.nn.Linear.__init__

    def watched(self: Any, *sizes: Any, **how: Any) -> None:
        init(self, *sizes, **how)
        drawn.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", watched)
    make(case, torch.device("meta"))
    assert drawn[:8] == ["meta"] * 8


def test_a_side_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(multi, "_bank", broken)
    monkeypatch.setitem(step.SIDES, "fastlora", broken)
    monkeypatch.setitem(groups.IMPLS, "fastlora", broken)
    for suite in ("block", "step", "multi"):
        assert all(line.endswith(" fastlora: RuntimeError: no such layer") for line in refuses(suite, tmp_path))


def test_the_roof_of_a_block_is_over_its_layers_and_what_is_between() -> None:
    """The floor's FLOPs are its products'; an MLP's bytes are three layers' and the activation's."""
    qkv = block.Case("tiny", "qkv", 5, 8, "fp32", "fp32", 0.0)
    mlp = replace(qkv, kind="mlp")
    product = 2 * 5 * 48 * 64
    for case in (qkv, mlp):
        assert block.work(case, FLOOR, "forward").flops == 3 * product
        assert block.work(case, FLOOR, "both").flops == 6 * product
        update = 2 * 5 * 8 * (48 + 64)
        assert block.work(case, "fastlora", "forward").flops == 3 * (product + update)
        assert block.work(case, "fastlora", "both").flops == 3 * (2 * product + 3 * update)
    layer = (5 * 48 + 48 * 64 + 5 * 64) * 4
    assert block.work(mlp, FLOOR, "forward").bytes == 3 * layer + 3 * 5 * 64 * 4


def test_the_roof_of_a_batch_counts_the_adapters_that_it_has() -> None:
    size = multi.Size(32, 48, 2, 4, 2, 64, requests=4, prefill=3)
    alone = multi.Case(size, "fp32", 1, 1, (4,), spread="identical")
    weights = (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) * 2 + 32 * 64
    factors = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)) * 2
    assert multi.work(alone, FLOOR).flops == 2 * 4 * weights
    assert multi.work(alone, "fastlora").flops == 2 * 4 * (weights + factors)
    none = multi.Case(size, "fp32", 1, 1, (4,), spread="identical", base=1)
    assert multi.work(none, "fastlora").flops == multi.work(none, FLOOR).flops
    many = replace(alone, adapters=4, spread="distinct")
    assert multi.work(many, "fastlora").flops == multi.work(alone, "fastlora").flops
    more = multi.work(many, "fastlora").bytes - multi.work(alone, "fastlora").bytes
    assert more == 3 * factors * 4, "three more adapters are read"
