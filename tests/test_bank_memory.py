"""Where a bank keeps its adapters: runs of rows, eviction, the host's bound, replacing, and loading all or nothing."""

from __future__ import annotations

import copy
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from banked import logits, prompter, saved, state_of, take, tenant
from hypothesis import given, settings
from hypothesis import strategies as st
from models import base_model, batch
from peft import PeftModel
from safetensors.torch import save
from tolerance import assert_same
from torch import Tensor, nn

from fastlora import AdapterBank
from fastlora.runs import Runs
from fastlora.storage import NoRoom


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return base_model()


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    """a to e, of rank 4; "big" of rank 9, and "biased" of rank 4 with a lora_bias."""
    made = {name: tenant(base, r=4) for name in "abcde"}
    return made | {"big": tenant(base, r=9), "biased": tenant(base, r=4, lora_bias=True)}


def bank_of(base: nn.Module, **options: Any) -> AdapterBank:
    return AdapterBank(copy.deepcopy(base), **{"max_loras": 4, "max_total_rank": 16, **options})


def output(bank: AdapterBank, *names: str | None) -> Tensor:
    inputs = {"input_ids": torch.arange(3, 3 + 5 * len(names)).view(len(names), 5)}
    with bank.use(names):
        return logits(bank._attached.model, inputs)


def where(bank: AdapterBank) -> dict[str, str]:
    return {entry.name: entry.where for entry in bank.list_adapters()}


def snapshot(bank: AdapterBank) -> tuple[Any, ...]:
    """All that a load might change: the books, the tables, and every row of every pool."""
    pools = [t.clone() for g in bank._attached.groups for t in (g.a_pool, *g.b_pools, g.rank, g.biased, g.scaling)]
    tables = bank._attached.tables
    runs = [dict(shelf.runs.taken) for shelf in bank._storage.shelves.values()]
    return bank.list_adapters(), runs, [tables.start.tolist(), list(tables.widest)], pools


def assert_unchanged(bank: AdapterBank, before: tuple[Any, ...]) -> None:
    after = snapshot(bank)
    assert after[:3] == before[:3]
    for ours, theirs in zip(after[3], before[3], strict=True):
        assert_same(ours, theirs)


@given(st.lists(st.integers(1, 9), max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_runs_never_overlap(sizes: list[int], chance: random.Random) -> None:
    runs, mine = Runs(32), [None] * 32
    for owner, rows in enumerate(sizes):
        start = runs.take(rows)
        longest = max((len(gap) for gap in "".join("x" if m is not None else " " for m in mine).split("x")), default=0)
        assert (start is None) == (longest < rows)
        if start is not None:
            assert all(m is None for m in mine[start : start + rows])
            mine[start : start + rows] = [owner] * rows
        if start is None or chance.random() < 0.3:
            first = chance.choice(sorted(runs.taken))
            mine[first : first + runs.taken[first]] = [None] * runs.taken[first]
            runs.give(first)
        assert runs.free == mine.count(None)
    for start, to, rows in runs.compact():
        moved = mine[start : start + rows]
        mine[start : start + rows] = [None] * rows
        assert all(m is None for m in mine[to : to + rows])
        mine[to : to + rows] = moved
    assert runs.gaps() == ([(32 - runs.free, runs.free)] if runs.free else [])
    assert all(m is not None for m in mine[: 32 - runs.free])


def test_the_least_recently_used_makes_room_and_comes_back_whole(
    base: nn.Module, tenants: dict[str, PeftModel]
) -> None:
    bank = bank_of(base)
    for name in "abcd":
        take(bank, name, tenants[name])
    before = {name: output(bank, name) for name in "bcda"}
    take(bank, "biased", tenants["biased"])
    assert where(bank) == {"a": "device", "b": "host", "c": "host", "d": "device", "biased": "device"}
    before["biased"] = output(bank, "biased")
    left = set()
    for name in ("b", "c", "a", "d", "biased", "b"):
        left |= {name for name, place in where(bank).items() if place == "host"}
        assert_same(output(bank, name), before[name])
        assert where(bank)[name] == "device"
    assert left == set(before)
    rows = {entry.name: entry.bytes for entry in bank.list_adapters()}
    assert rows["a"] == sum(t.nbytes for t in state_of(tenants["a"])[0].values()) < rows["biased"]


def test_neither_the_pinned_nor_the_used_leave(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"], pinned=True)
    for name in "bcde":
        take(bank, name, tenants[name])
    assert where(bank) == {"a": "device", "b": "host", "c": "device", "d": "device", "e": "device"}
    with bank.use(["c", "d"]):
        assert where(bank)["c"] == "device"
        with bank.use(["b"]):
            assert where(bank) == {"a": "device", "b": "device", "c": "device", "d": "device", "e": "host"}
            with pytest.raises(NoRoom, match=r"'e': .* takes 4 rank rows .* 0 are free, .* 16 are in use or pinned"):
                output(bank, "e")
            take(bank, "late", tenants["e"])
            assert where(bank)["late"] == "host"
            with pytest.raises(NoRoom):
                take(bank, "later", tenants["e"], pinned=True)
    with pytest.raises(NoRoom):
        output(bank, *"abcde")
    bank.pin_adapter("a", False)
    output(bank, "b", "c", "d", "e")
    assert where(bank)["a"] == "host"
    with pytest.raises(NoRoom, match="it takes 9 rank rows"):
        take(bank_of(base, max_total_rank=8), "big", tenants["big"])


def test_the_host_keeps_to_its_bound(
    base: nn.Module, tenants: dict[str, PeftModel], caplog: pytest.LogCaptureFixture
) -> None:
    bank = bank_of(base, max_loras=2)
    take(bank, "a", tenants["a"])
    size = bank.list_adapters()[0].bytes
    bank = bank_of(base, max_loras=2, host_bytes=2 * size)
    with caplog.at_level(logging.WARNING, "fastlora"):
        for name in "abcd":
            take(bank, name, tenants[name])
        assert not caplog.messages and list(where(bank).values()) == ["host", "host", "device", "device"]
        output(bank, "a")
        take(bank, "e", tenants["e"])
    assert where(bank) == {"a": "device", "c": "host", "d": "host", "e": "device"}
    assert "'b'" in caplog.text
    assert sum(version.bytes for version in bank._storage.host) == 2 * size
    with pytest.raises(KeyError, match="dropped from a full host cache"):
        output(bank, "b")


def test_gaps_are_closed_when_nothing_runs(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_loras=8, max_total_rank=21)
    for name in "abcd":
        take(bank, name, tenants[name], pinned=True)
    take(bank, "biased", tenants["biased"], pinned=True)
    before = {name: output(bank, name) for name in ("b", "d", "biased")}
    bank.delete_adapter("a")
    bank.delete_adapter("c")
    with bank.use(["b"]), pytest.raises(NoRoom, match="8 are free, 4 of them together"):
        take(bank, "big", tenant(base, r=8), pinned=True)
    bank.prepare([0])
    with pytest.raises(NoRoom):
        take(bank, "big", tenant(base, r=8), pinned=True)
    bank.prepare(None)
    take(bank, "big", tenant(base, r=8), pinned=True)
    assert set(where(bank).values()) == {"device"} and bank._lora.runs.free == 0
    bank._batches.clear()  # they hold factors gathered before
    for name, expected in before.items():
        assert_same(output(bank, name), expected)


def test_replacing(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """A batch keeps the version that it began with; the next one has the new, and the old one's room is free."""
    bank = bank_of(base)
    assert take(bank, "a", tenants["a"], pinned=True) == 1
    with pytest.raises(ValueError, match="replace=True"):
        take(bank, "a", tenants["b"])
    old = output(bank, "a")
    with bank.use(["a"]):
        assert take(bank, "a", tenants["b"], replace=True) == 2
        assert len(bank._lora.resident) == 2
        assert_same(logits(bank._attached.model, {"input_ids": torch.arange(3, 8)[None]}), old)
        assert not torch.equal(output(bank, "a"), old)
    assert len(bank._lora.resident) == 1
    (entry,) = bank.list_adapters()
    assert (entry.generation, entry.pinned) == (2, True)
    assert take(bank, "a", tenants["a"], replace=True) == 3
    assert_same(output(bank, "a"), old)
    bank.delete_adapter("a")
    assert take(bank, "a", tenants["a"]) == 4
    full = bank_of(base, max_loras=1, max_total_rank=4, host_bytes=0)
    take(full, "a", tenants["a"], pinned=True)
    take(full, "a", tenants["b"], replace=True)
    assert where(full) == {"a": "device"}


def test_deleting(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    old = output(bank, "a")
    with bank.use(["a"]):
        bank.delete_adapter("a")
        assert not bank.list_adapters()
        assert_same(logits(bank._attached.model, {"input_ids": torch.arange(3, 8)[None]}), old)
    assert not bank._lora.resident and bank._lora.runs.free == 16 and not bank._batches
    with pytest.raises(KeyError, match="none are loaded"):
        bank.delete_adapter("a")


def test_the_last_mixes_are_gathered_once(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    for name in "ab":
        take(bank, name, tenants[name])
    output(bank, "a", "b")
    (batch,) = bank._batches.values()
    output(bank, "a", "b")
    assert list(bank._batches.values()) == [batch]
    output(bank, "b", "a")
    assert len(bank._batches) == 2
    take(bank, "b", tenants["c"], replace=True)
    assert not bank._batches
    for names in ("a", "b", "ab", "ba", "aab", "abb"):
        output(bank, *names)
    assert len(bank._batches) == 4


def test_prompts_share_the_same_rules(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base, max_prompts=2, max_prompt_tokens=8)
    inputs = batch(rows=1)
    outputs = {}
    for name, tokens in (("p", 5), ("q", 3), ("s", 8)):
        take(bank, name, prompter(base, tokens))
        with bank.use(prompt_names=[name]):
            outputs[name] = logits(bank._attached.model, inputs)
    assert where(bank) == {"p": "host", "q": "host", "s": "device"}
    for name, expected in outputs.items():
        with bank.use(prompt_names=[name]):
            assert_same(logits(bank._attached.model, inputs), expected)
    state, config = state_of(prompter(base, 5))
    with pytest.raises(ValueError, match=r"got shape \(5, 64\), wanted \(4, 64\)"):
        bank.load_adapter(state, "short", config={**config, "num_virtual_tokens": 4})
    with pytest.raises(NoRoom, match="9 virtual tokens"):
        take(bank, "long", prompter(base, 9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(use_dora=True), "use_dora=True"),
        (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (dict(target_parameters=["w"]), "target_parameters"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(bias="all"), "bias='all'"),
        (dict(use_something_new=True), "use_something_new"),
        (dict(peft_type="LOHA"), "'LOHA'"),
        (dict(r=5), r"got shape \(4, 64\), wanted \(5, 64\)"),
        (dict(r=0), "rank 0"),
        (dict(r="4"), "r='4'"),
        (dict(lora_alpha=float("nan")), "lora_alpha=nan"),
        (dict(rank_pattern={"(": 4}), "rank_pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(change: dict[str, Any], said: str, base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    before = snapshot(bank)
    state, config = state_of(tenants["b"])
    with pytest.raises(ValueError, match=said):
        bank.load_adapter(state, "b", config={**config, **change})
    with pytest.raises(ValueError, match=said):
        bank.load_adapter(state, "a", config={**config, **change}, replace=True)
    assert_unchanged(bank, before)


def test_tensors_that_are_refused(base: nn.Module, tenants: dict[str, PeftModel], tmp_path: Path) -> None:
    bank = bank_of(base)
    before = snapshot(bank)
    state, config = state_of(tenants["b"])
    key = next(key for key in state if "lora_A" in key)
    for value, said in (
        (state[key].clone().index_fill_(1, torch.tensor([3]), float("nan")), "NaN or infinite"),
        (state[key][:, :-1], r"got shape \(4, 63\), wanted \(4, 64\)"),
        (state[key].long(), "got dtype torch.int64"),
    ):
        with pytest.raises(ValueError, match=f"{key.removeprefix('base_model.model.')}.*{said}"):
            bank.load_adapter({**state, key: value}, "b", config=config)
    with pytest.raises(ValueError, match=r"NaN or infinite values \(in torch\.float16"):
        bank_of(base, dtype=torch.float16).load_adapter({**state, key: state[key] + 1e6}, "b", config=config)
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        bank.load_adapter(
            {**state, key.replace("lora_A.weight", "lora_magnitude_vector"): state[key]}, "b", config=config
        )
    with pytest.raises(ValueError, match="embed_tokens"):
        bank.load_adapter({**state, "base_model.model.model.embed_tokens.weight": state[key]}, "b", config=config)
    with pytest.raises(ValueError, match=r"lora_B\.weight is missing"):
        bank.load_adapter({k: t for k, t in state.items() if k != key.replace("_A", "_B")}, "b", config=config)
    with pytest.raises(ValueError, match="none of the model's layers"):
        bank.load_adapter({f"x.{key}": t for key, t in state.items()}, "b", config=config)
    with pytest.raises(ValueError, match="config: got None"):
        bank.load_adapter(state, "b")
    with pytest.raises(ValueError, match="adapter_name: got '__base__'"):
        bank.load_adapter(state, "__base__", config=config)
    with pytest.raises(FileNotFoundError, match=r"wanted adapter_model\.safetensors"):
        bank.load_adapter(tmp_path, "b")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickle"):
        bank.load_adapter(tmp_path, "b")
    assert_unchanged(bank, before)


def test_keys_in_every_spelling(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """As saved, as in a live model's state dict, and without PEFT's prefix: one adapter."""
    bank = bank_of(base)
    state, config = state_of(tenants["a"])
    live = {key: t for key, t in tenants["a"].state_dict().items() if "lora_" in key}
    bare = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    assert {key.replace(".default", "") for key in live} == set(state) and any(".default" in key for key in live)
    outputs = []
    for name, keys in (("saved", state), ("live", live), ("bare", bare)):
        bank.load_adapter(keys, name, config=tenants["a"].peft_config["default"])
        outputs.append(output(bank, name))
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])
    with pytest.raises(ValueError, match="one adapter's"):
        bank.load_adapter({**live, **{key.replace("default", "b"): t for key, t in live.items()}}, "two", config=config)


@pytest.fixture(scope="module")
def victim(base: nn.Module, tenants: dict[str, PeftModel]) -> tuple[AdapterBank, bytes]:
    """A bank that somebody attacks, and a good file."""
    bank = bank_of(base)
    take(bank, "a", tenants["a"])
    return bank, save({key: t.contiguous() for key, t in state_of(tenants["b"])[0].items()})


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_files_never_change_the_bank(
    data: st.DataObject,
    victim: tuple[AdapterBank, bytes],
    tenants: dict[str, PeftModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Cut short, overwritten, or filled with NaN: refused with a ValueError. A change of one finite number into
    another is beyond detection, so there the header alone is damaged."""
    bank, good = victim
    before = snapshot(bank)
    header = int.from_bytes(good[:8], "little") + 8
    how = data.draw(st.sampled_from(("cut", "header", "payload")))
    if how == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif how == "header":
        at = data.draw(st.integers(0, header - 1))
        bad = good[:at] + data.draw(st.binary(min_size=1, max_size=8).filter(lambda b: b != good[at : at + len(b)]))
        bad += good[len(bad) :]
    else:
        at = header + 4 * data.draw(st.integers(0, (len(good) - header) // 4 - 1))
        bad = good[:at] + b"\x00\x00\xc0\x7f" + good[at + 4 :]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "adapter_config.json").write_text(json.dumps(state_of(tenants["b"])[1], default=list))
    (folder / "adapter_model.safetensors").write_bytes(bad)
    try:
        bank.load_adapter(folder, "b")
    except ValueError:
        assert_unchanged(bank, before)
        return
    assert how == "header", "what is cut or holds a NaN must be refused"
    bank.delete_adapter("b")  # a renamed or swapped tensor of the right shape, say: a good file of another adapter
    assert bank.list_adapters() == before[0]


def test_a_good_folder_loads_and_a_bad_config_does_not(
    base: nn.Module, tenants: dict[str, PeftModel], tmp_path: Path
) -> None:
    bank = bank_of(base)
    folder = saved(tenants["a"], tmp_path)
    bank.load_adapter(str(folder), "a")
    before = snapshot(bank)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        bank.load_adapter(folder, "b")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(TypeError, match="config: got list"):
        bank.load_adapter(folder, "b")
    assert_unchanged(bank, before)


@pytest.mark.parametrize("what", ["max_loras", "max_total_rank", "max_prompts", "max_prompt_tokens"])
def test_sizes_are_checked(what: str, base: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{what}: got 0"):
        AdapterBank(base, **{what: 0})
