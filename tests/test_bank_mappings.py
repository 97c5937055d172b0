"""Prepared mappings: numbers mean the adapters they were given out for or the base, and never whoever came later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from banked import bank_of, model_of, state_of, take, tenant
from models import base_model, logits
from peft import PeftModel
from tolerance import assert_same, relative_error
from torch import Tensor, nn

from fastlora import AdapterBank, dispatch, ops, serving
from fastlora.standing import Standing
from fastlora.storage import NoRoom

IDS = {"input_ids": torch.arange(3, 13).view(2, 5)}


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    return {name: tenant(base, r=4) for name in "abc"}


@pytest.fixture
def bank(base: nn.Module, tenants: dict[str, PeftModel]) -> Iterator[AdapterBank]:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    yield bank
    bank.prepare(None)
    assert not bank._lora.standing


def served(bank: AdapterBank) -> Tensor:
    return logits(model_of(bank), IDS)


def assert_served(bank: AdapterBank, model: nn.Module) -> None:
    assert relative_error(served(bank), logits(model, IDS).double()) < 1e-5


@pytest.mark.parametrize(
    ("mapping", "error", "said"),
    [
        ([4] * 10, ValueError, "got 4 to 4, wanted −1 to 3"),
        (torch.full((10,), -2), ValueError, "got -2 to -2, wanted −1 to 3"),
        (torch.full((10,), 2**32), ValueError, "got 4294967296 to"),
        ([2**70], ValueError, r"got \[1180591620717411303424\], wanted whole numbers from −1 to 3"),
        ([], ValueError, r"got shape \(0,\)"),
        (torch.zeros(0, dtype=torch.int32), ValueError, r"got shape \(0,\)"),
        (torch.zeros(2, 5, dtype=torch.int32), ValueError, r"got shape \(2, 5\)"),
        (5, ValueError, r"got shape \(\)"),
        ([0.0], TypeError, "got torch.float32"),
        ([True], TypeError, "got torch.bool"),
        ("abc", ValueError, "got 'abc'"),
        ([None], ValueError, r"got \[None\]"),
    ],
    ids=lambda value: f"{value!r:.20}" if isinstance(value, (list, str)) else "",
)
def test_what_is_no_mapping(mapping: Any, error: type[Exception], said: str, bank: AdapterBank) -> None:
    bank.prepare([bank.slot("a")] * 10)
    with pytest.raises(error, match=f"token_lora_mapping: .*{said}"):
        bank.prepare(mapping)
    assert len(bank._lora.standing) == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_that_only_the_device_sees_are_the_base_when_out_of_bounds(
    dtype: torch.dtype, base: nn.Module, tenants: dict[str, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel reads is in bounds, whatever was asked for."""
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    routed = []
    monkeypatch.setattr(ops.kernels, "route", lambda slots, routes: routed.append(slots.tolist()))
    bank = bank_of(base)
    for name in "abc":
        take(bank, name, tenants[name])
    first, last = bank.slot("a"), bank.slot("c")
    top = torch.iinfo(torch.int32).max
    wild = [first, last, 3, 4, 5, 1000, top, -1, -2, -top] + (
        [2**32, 2**32 + last, -(2**32), 2**62] if dtype == torch.int64 else []
    )
    mapping = Standing(bank._attached.tables, len(wild))
    mapping.ask(torch.tensor(wild, dtype=dtype))
    assert routed == [[first, last] + [-1] * (len(wild) - 2)]


def test_the_fused_launch_reads_no_slot_past_the_end(
    base: nn.Module, tenants: dict[str, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = base_model(layers=1)
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    bank = bank_of(small, max_loras=2, fused_rows=16)
    bank.prepare([-1] * 10)
    serving.standing(bank._attached.tables).ask(torch.full((10,), 10**6))
    assert relative_error(served(bank), logits(small, IDS).double()) < 1e-5
    bank.prepare(None)


def test_a_number_is_never_somebody_elses(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """Deleted, the rows are the base's, whoever takes the slot: until `slot` gives the number out again."""
    bank = bank_of(base, max_loras=1)
    take(bank, "a", tenants["a"])
    old = bank.slot("a")
    bank.prepare([old] * 10)
    assert_served(bank, tenants["a"])
    bank.delete_adapter("a")
    assert_same(served(bank), logits(base, IDS))
    take(bank, "b", tenants["b"])
    assert_same(served(bank), logits(base, IDS))
    bank.prepare([old] * 10)
    assert_same(served(bank), logits(base, IDS))
    assert bank.slot("b") == old
    bank.prepare([old] * 10)
    assert_served(bank, tenants["b"])
    bank.prepare(None)


def test_the_number_of_an_evicted_adapter_is_the_base(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_loras=1)
    take(bank, "a", tenants["a"])
    old = bank.slot("a")
    bank.pin_adapter("a", False)
    take(bank, "b", tenants["b"])
    assert bank._versions["b"].slot == old
    bank.prepare([old] * 10)
    assert_same(served(bank), logits(base, IDS))
    bank.prepare(None)


def test_a_mapping_stands_on_whole_versions(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """Replaced in the middle of a forward, an adapter serves that forward to its end; the next one has the base."""
    bank = bank_of(base, max_loras=2, max_total_rank=8)
    take(bank, "a", tenants["a"])
    bank.prepare([bank.slot("a")] * 10)
    state, config = state_of(tenants["b"])

    def replaced(*_: Any) -> None:
        handle.remove()
        other = threading.Thread(target=lambda: bank.load_adapter(state, "a", config=config, replace=True))
        other.start()
        other.join()
        with pytest.raises(NoRoom):
            take(bank, "c", tenants["c"], pinned=True)

    handle = model_of(bank).model.layers[1].register_forward_pre_hook(replaced)
    assert_served(bank, tenants["a"])
    assert [entry.generation for entry in bank.list_adapters()] == [2]
    assert_same(served(bank), logits(base, IDS))
    bank.prepare([bank.slot("a")] * 10)
    assert_served(bank, tenants["b"])
    take(bank, "c", tenants["c"], pinned=True)
    bank.prepare(None)


def test_what_has_a_number_stays(bank: AdapterBank, tenants: dict[str, PeftModel]) -> None:
    """`slot` pins: a mapping's adapters are never evicted for others."""
    slot = bank.slot("a")
    for name in ("b", "c", "d", "e", "f"):
        take(bank, name, tenants["b"])
    (entry,) = [entry for entry in bank.list_adapters() if entry.name == "a"]
    assert (entry.where, entry.pinned) == ("device", True)
    assert bank.slot("a") == slot


def test_unpinned_a_mapping_keeps_it_until_it_goes(bank: AdapterBank, tenants: dict[str, PeftModel]) -> None:
    bank.prepare([bank.slot("a")] * 10)
    bank.pin_adapter("a", False)
    for name in ("b", "c", "d", "e", "f"):
        take(bank, name, tenants["b"])
    assert_served(bank, tenants["a"])


def test_mappings_made_in_inference_mode_go_on_outside(bank: AdapterBank, tenants: dict[str, PeftModel]) -> None:
    slot = bank.slot("a")
    with torch.inference_mode():
        bank.prepare([-1] * 10)
    bank.prepare([slot] * 10)
    assert_served(bank, tenants["a"])


def test_prepare_has_no_place_inside_use(bank: AdapterBank, base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """There `use` says what is served; the mapping goes on after it."""
    bank.prepare([bank.slot("a")] * 10)
    with bank.use([None, None]):
        for mapping in ([-1] * 10, None):
            with pytest.raises(RuntimeError, match="inside of `use`"):
                bank.prepare(mapping)
        assert_same(served(bank), logits(base, IDS))
    assert_served(bank, tenants["a"])


def test_buffers_that_stand_no_more_are_the_base(bank: AdapterBank) -> None:
    """A graph captured over them, and replayed without another `prepare`, serves nobody who may be gone."""
    bank.prepare([bank.slot("a")] * 10)
    left = serving.standing(bank._attached.tables)
    bank.prepare([bank.slot("a")] * 5)
    assert left.mapping.tolist() == [-1] * 10
    assert list(bank._lora.standing) == [serving.standing(bank._attached.tables)]


def test_outputs_that_wait_are_not_anothers(bank: AdapterBank, base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """q, k and v come from one launch; what waits for a call is for the same batch, and x as it was, alone."""
    take(bank, "b", tenants["b"])
    block = model_of(bank).model.layers[0].self_attn
    x = torch.randn(2, 5, 64)

    def alone(name: str, x: Tensor) -> Tensor:
        with bank.use([name] * 2), torch.no_grad():
            return block.k_proj(x)

    expected = {name: alone(name, x.clone()) for name in "ab"}
    with torch.no_grad(), bank.use(["a", "a"]):
        block.q_proj(x)
        with bank.use(["b", "b"]):
            assert_same(block.k_proj(x), expected["b"])
        block.q_proj(x)
        serving_another = bank._batch([bank._versions["b"]] * 2)
        with serving.serving(serving_another):
            assert_same(block.k_proj(x), expected["b"])
        block.q_proj(x)
        x.mul_(2)
        assert_same(block.k_proj(x), alone("a", x.clone()))


def test_use_and_prepare_let_go_of_what_waits(bank: AdapterBank) -> None:
    """A layer that was never called leaves its output to nobody: neither memory nor a later batch has it."""
    block = model_of(bank).model.layers[0].self_attn
    (group,) = [group for group in bank._attached.groups if block.q_proj in group.members]
    x = torch.randn(2, 5, 64)
    with torch.no_grad(), bank.use(["a", "a"]):
        block.q_proj(x)
        assert group._ready.outputs is not None
    assert group._ready.outputs is None
    bank.prepare([bank.slot("a")] * 10)
    with torch.no_grad():
        block.q_proj(x)
    assert group._ready.outputs is not None
    bank.prepare([-1] * 10)
    assert group._ready.outputs is None
