"""Loading into a bank is all or nothing: every spelling of a good adapter, and what is refused or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from banked import bank_of, output, saved, state_of, take, tenant
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save
from tolerance import assert_same
from torch import nn

from fastlora import AdapterBank


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    return {name: tenant(base, r=4) for name in "ab"}


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
