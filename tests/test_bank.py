"""AdapterBank: every row is what plain PEFT computes for that request alone; base rows are the base's, to the bit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from banked import (
    RANKS,
    bank_with,
    model_of,
    names,
    prompter,
    rows,
    saved,
    state_of,
    take,
    tenant,
    tenants_of,
)
from models import base_model, batch, logits, peft_model
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from tolerance import FACTOR_OF_ONE_AMONG_MANY, assert_all_close, assert_same, one_rounding, relative_error
from torch import Tensor, nn

import fastlora
from fastlora import AdapterBank, MultiLoRALinear, stacks

MAPPINGS = {
    "identical": [4, 4, 4, 4, 4, 4],
    "uniform": [0, 1, None, 0, 1, 0],
    "zipf": [2, 2, 2, None, 3, 0],
    "distinct": [0, 1, 2, None, 3, 4],
}


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "t5", "gpt2"])
def test_each_row_is_that_request_alone_in_peft(family: str, by_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU has all adapters in one product, and where those of each rank have theirs."""
    if by_rank:
        monkeypatch.setattr(stacks, "CLASS_BYTES", 1)
    draws = []
    for seed, (what, mapping) in enumerate(MAPPINGS.items()):
        torch.manual_seed(seed)
        models = tenants_of(base_model(family), family)
        bank, inputs = bank_with(models), batch(family, rows=6)
        base = logits(models[None], inputs)
        with bank.use(adapter_names=names(mapping)):
            mixed = logits(model_of(bank), inputs)
        exact = {name: copy.deepcopy(model).double() for name, model in models.items()}
        triple: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for row, name in enumerate(names(mapping)):
            if name is None:
                assert_same(mixed[row], base[row])
            else:
                assert relative_error(mixed[row], base[row].double()) > 1e-3, "the adapter must matter"
                alone = (
                    mixed[row : row + 1],
                    logits(models[name], rows(inputs, row)),
                    logits(exact[name], rows(inputs, row)),
                )
                for results, value in zip(triple, alone, strict=True):
                    results[f"{what} {row}"] = value
        draws.append(triple)
    assert_all_close(draws)


def test_sixty_four_adapters_in_one_batch() -> None:
    """Each request its own, of every rank, a base row after every eighth."""
    base, who = base_model(), [f"t{i}" for i in range(64)]
    mapping = [name for i, own in enumerate(who) for name in ((own, None) if i % 8 == 7 else (own,))]
    bank, inputs = AdapterBank(copy.deepcopy(base), max_loras=64), batch(rows=len(mapping))
    triple: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    expected = {}
    for i, name in enumerate(who):
        r = RANKS[i % len(RANKS)]
        model, row = tenant(base, r=r, lora_alpha=max(1, r // 2)), rows(inputs, mapping.index(name))
        take(bank, name, model)
        expected[name] = logits(model, row), logits(model.double(), row)
    with bank.use(adapter_names=mapping):
        mixed = logits(model_of(bank), inputs)
    alone = logits(base, inputs)
    for row, name in enumerate(mapping):
        if name is None:
            assert_same(mixed[row], alone[row])
        else:
            for results, value in zip(triple, (mixed[row : row + 1], *expected[name]), strict=True):
                results[name] = value
    assert_all_close([triple])


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
def test_greedy_tokens_are_those_alone(family: str) -> None:
    models = tenants_of(base_model(family), family)
    bank = bank_with(models)
    inputs = {"input_ids": batch(family, rows=6)["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)
    base, changed = models[None].generate(**inputs, **options), 0
    for mapping in MAPPINGS.values():
        with bank.use(adapter_names=names(mapping)):
            mixed = model_of(bank).generate(**inputs, **options)
        for row, name in enumerate(names(mapping)):
            assert_same(mixed[row : row + 1], models[name].generate(**rows(inputs, row), **options))
        changed += int((mixed != base).any(1).sum())
    assert changed >= 4, "the adapters must matter"


@pytest.mark.parametrize(
    "options",
    [
        dict(r=4, use_rslora=True, lora_alpha=7),
        dict(r=4, lora_bias=True),
        dict(r=3, rank_pattern={r"layers\.1\..*": 2, "q_proj": 7}, alpha_pattern={r"layers.0.self_attn.v_proj": 5}),
        dict(r=4, layers_to_transform=[1]),
    ],
    ids=["rslora", "lora_bias", "patterns", "one layer"],
)
def test_what_a_config_can_say(options: dict[str, Any], tmp_path: Path) -> None:
    """From PEFT's own folder, and back through PEFT's own loading."""
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        base, inputs = base_model(), batch()
        folder = saved(tenant(base, **options), tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        bank = AdapterBank(copy.deepcopy(base))
        bank.load_adapter(folder, "a")
        with bank.use(["a", "a", "a"]):
            ours = logits(model_of(bank), inputs)
        exact = logits(copy.deepcopy(theirs).double(), inputs)
        draws.append(({"y": ours}, {"y": logits(theirs, inputs)}, {"y": exact}))
    assert_all_close(draws)


def test_outside_of_use_the_model_is_its_base() -> None:
    models = tenants_of(base_model(), "llama")
    bank, inputs = bank_with(models), batch()
    base = logits(models[None], inputs)
    assert_same(logits(model_of(bank), inputs), base)
    with pytest.raises(ZeroDivisionError), bank.use(["r4"] * 3):
        assert not torch.equal(logits(model_of(bank), inputs), base)
        raise ZeroDivisionError
    assert_same(logits(model_of(bank), inputs), base)
    with bank.use([None, "__base__", None]):
        assert_same(logits(model_of(bank), inputs), base)
    with bank.use(["r4"] * 3), bank.use():
        assert_same(logits(model_of(bank), inputs), base)


def test_close_puts_everything_back() -> None:
    model = base_model()
    before = dict(model.named_modules())
    bank = AdapterBank(model)
    replaced = {name for name, module in model.named_modules() if isinstance(module, MultiLoRALinear)}
    assert len(replaced) == 2 * 7 and not any("lm_head" in name for name in replaced)
    assert len(bank._attached.groups) == 2 * 4, "q, k, v and gate, up share their launches"
    bank.close()
    assert dict(model.named_modules()) == before and "forward" not in vars(model)
    with pytest.raises(RuntimeError, match="closed"), bank.use([None]):
        pass


@pytest.mark.parametrize("patched", [False, True], ids=["PEFT's", "fastlora.patch"])
def test_a_peft_model(patched: bool) -> None:
    """Its adapters come into the bank under their names, and are its own again afterwards."""
    model = peft_model(r=4)
    model.add_adapter("second", tenant(base_model(), r=7).peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("second", 3.0)
    if patched:
        fastlora.patch(model)
    inputs, before = batch(rows=2), dict(model.named_modules())
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        exact = logits(copy.deepcopy(model).double(), inputs)
        alone[name] = logits(model, inputs), exact
    bank = AdapterBank(model)
    assert [(entry.name, entry.rank) for entry in bank.list_adapters()] == [("default", 4), ("second", 7)]
    with bank.use(["default", "second"]):
        mixed = logits(model, inputs)
    ours = {name: mixed[row] for row, name in enumerate(alone)}
    plain = {name: alone[name][0][row] for row, name in enumerate(alone)}
    assert_all_close([(ours, plain, {name: alone[name][1][row] for row, name in enumerate(alone)})])
    bank.close()
    assert dict(model.named_modules()) == before
    assert_same(logits(model, inputs), alone["second"][0])


def test_a_quantised_base() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = base_model().to(torch.bfloat16)
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    theirs = get_peft_model(copy.deepcopy(base), tenant(base_model(), r=4).peft_config["default"]).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    bank, inputs = AdapterBank(copy.deepcopy(base), dtype=torch.float32), batch()
    take(bank, "a", theirs)
    with bank.use(["a", None, "a"]):
        mixed = logits(model_of(bank), inputs)
    plain, alone = logits(theirs, inputs), logits(base, inputs)
    assert_same(mixed[1], alone[1])
    assert relative_error(mixed[0], plain[0].double()) < 16 * one_rounding(torch.bfloat16)
    assert relative_error(mixed[0], alone[0].double()) > 32 * one_rounding(torch.bfloat16)


def test_prompts_and_adapters_in_one_batch() -> None:
    """With both, a row is PEFT's LoRA model fed the prompt's embeddings; with a prompt alone PEFT's prompt tuning."""
    base = base_model()
    lora, soft, inputs = tenant(base, r=4), prompter(base, 5), batch(rows=4)
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    bank = AdapterBank(copy.deepcopy(base))
    take(bank, "a", lora)
    take(bank, "p", soft)
    assert [(e.name, e.kind, e.tokens) for e in bank.list_adapters()] == [("a", "lora", 0), ("p", "prompt", 5)]

    def both(model: PeftModel, ids: Tensor) -> Tensor:
        virtual = soft.prompt_encoder["default"].embedding.weight.to(model.dtype)[None]
        embeds = torch.cat((virtual, model.get_input_embeddings()(ids)), 1)
        return logits(model, {"inputs_embeds": embeds})[:, 5:]

    with bank.use(adapter_names=["a", None, "a", None], prompt_names=[None, "p", "p", None]):
        mixed = logits(model_of(bank), inputs)
    one = [rows(inputs, row) for row in range(4)]
    draws = [{f"row {row}": mixed[row : row + 1] for row in range(4)}]
    for la, so, ba in ((lora, soft, base), tuple(copy.deepcopy(m).double() for m in (lora, soft, base))):
        alone = logits(la, one[0]), logits(so, one[1])[:, 5:], both(la, one[2]["input_ids"]), logits(ba, one[3])
        draws.append({f"row {row}": value for row, value in enumerate(alone)})
    assert_all_close([(draws[0], draws[1], draws[2])])


def test_gradients_reach_the_input() -> None:
    """Frozen adapters still pass gradients on, as PEFT's do."""
    draws = []
    for seed in range(6):
        torch.manual_seed(seed)
        base = base_model()
        theirs = tenant(base, r=4)
        bank, ids = AdapterBank(copy.deepcopy(base)), batch(rows=2)["input_ids"]
        take(bank, "a", theirs)
        grads: list[dict[str, Tensor]] = []
        for model in (model_of(bank), theirs, copy.deepcopy(theirs).double()):
            embeds = base.get_input_embeddings()(ids).detach().to(model.dtype).requires_grad_()
            with bank.use(["a", "a"]):
                model(inputs_embeds=embeds).logits.square().sum().backward()
            grads.append({"dx": embeds.grad})
        draws.append((grads[0], grads[1], grads[2]))
    assert_all_close(draws)


def test_names_are_never_taken_for_the_base() -> None:
    bank = bank_with(tenants_of(base_model(), "llama"))
    take(bank, "prompt", prompter(base_model(), 2))
    with pytest.raises(ValueError, match=r"'r44'.*wanted one of: 'r4'"), bank.use(["r44"]):
        pass
    with pytest.raises(ValueError, match=r"'promt'.*wanted one of: 'prompt'$"), bank.use(prompt_names=["promt"]):
        pass
    with pytest.raises(KeyError), bank.use([""]):
        pass
    with pytest.raises(ValueError, match="belongs in prompt_names"), bank.use(["prompt"]):
        pass
    with pytest.raises(ValueError, match="belongs in adapter_names"), bank.use(prompt_names=["r4"]):
        pass
    with pytest.raises(TypeError, match="adapter_names"), bank.use("r4"):
        pass
    with pytest.raises(ValueError, match="got 1 names, wanted 2"), bank.use(["r4", "r4"], ["prompt"]):
        pass
    with pytest.raises(ValueError, match="got 3 rows, wanted the batch's 2"), bank.use(["r4", None]):
        logits(model_of(bank), batch(rows=3))
    assert not any(version.users for version in bank._versions.values())


def test_modules_that_one_of_the_two_lacks(caplog: pytest.LogCaptureFixture) -> None:
    """As PEFT: factors for a module that the model lacks are ignored, and where they are missing the base serves."""
    base = base_model(layers=2)
    bigger = tenant(base_model(layers=3), r=4)
    state, config = state_of(bigger)
    state = {key: t for key, t in state.items() if "layers.0.mlp.down_proj" not in key}
    bank, inputs = AdapterBank(copy.deepcopy(base)), batch()
    with caplog.at_level(logging.WARNING, "fastlora"):
        bank.load_adapter(state, "a", config=config)
    lacking, missing = sorted(caplog.messages, key=lambda m: "no factors" in m)
    assert "model.layers.2.self_attn.q_proj" in lacking and "layers.1" not in lacking
    assert "model.layers.0.mlp.down_proj" in missing and "layers.1" not in missing
    theirs = get_peft_model(copy.deepcopy(base), bigger.peft_config["default"]).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    set_peft_model_state_dict(theirs, state)
    with bank.use(["a"] * 3):
        ours = logits(model_of(bank), inputs)
    plain = logits(theirs, inputs)
    exact = logits(theirs.double(), inputs)
    assert relative_error(ours, exact) <= FACTOR_OF_ONE_AMONG_MANY * relative_error(plain, exact)


def test_target_modules() -> None:
    state, config = state_of(tenant(base_model(), r=4))
    model = base_model()
    bank = AdapterBank(model, target_modules=["q_proj", "v_proj"])
    assert set(bank._attached.layers) == {f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"}
    with pytest.raises(ValueError, match=r"k_proj.*the bank does not serve"):
        bank.load_adapter(state, "a", config=config)
    bank.close()
    assert len(AdapterBank(model, target_modules=r".*\.1\.mlp\..*")._attached.layers) == 3
    with pytest.raises(ValueError, match=r"target_modules: got \['nobody'\]"):
        AdapterBank(base_model(), target_modules=["nobody"])
    for odd in ("(", 3):
        with pytest.raises(ValueError, match=r"target_modules: got .*, wanted name endings or a regex"):
            AdapterBank(base_model(), target_modules=odd)
    with pytest.raises(ValueError, match="dtype: got 'float32', wanted a floating dtype"):
        AdapterBank(base_model(), dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PROMPT_TUNING"):
        AdapterBank(prompter(base_model(), 3))
