"""A bank's prefixes are those of the loads that a batch began with, and go when these are gone."""

from __future__ import annotations

from typing import Any

import pytest
from banked import bank_of, model_of, prompter, take, tenant
from models import VOCABULARY, base_model, logits
from peft import PeftModel
from tolerance import assert_same, relative_error
from torch import Tensor, arange, compile, nn, no_grad
from transformers import BartConfig, BartForCausalLM

from fastlora import AdapterBank, add_soft_prompt

ROW = {"input_ids": arange(3, 8)[None]}


def answer(bank: AdapterBank, adapter: str | None = "a", prompt: str = "p") -> Tensor:
    with bank.use([adapter], [prompt]):
        return logits(model_of(bank), ROW)


def alone(base: nn.Module, adapter: PeftModel | None, prompt: PeftModel) -> Tensor:
    bank = bank_of(base)
    take(bank, "p", prompt)
    if adapter is not None:
        take(bank, "a", adapter)
    return answer(bank, None if adapter is None else "a")


def kept(bank: AdapterBank) -> list[tuple[int, ...]]:
    """The generations (prompt, adapter) of the prefixes that are kept."""
    found: Any = bank._prompts._prefixes
    return [request.version for request, *_ in found]


def test_a_prefix_is_of_the_loads_of_prompt_and_adapter(base: nn.Module) -> None:
    """With one slot each, nothing but their generations tells a new adapter or prompt from the old."""
    bank = bank_of(base, max_loras=1, max_prompts=1)
    adapters, prompts = [tenant(base, r=4) for _ in range(2)], [prompter(base, 3) for _ in range(2)]
    loads = [take(bank, "p", prompts[0]), take(bank, "a", adapters[0])]
    assert_same(answer(bank), alone(base, adapters[0], prompts[0]))
    assert kept(bank) == [tuple(loads)]
    loads[1] = take(bank, "a", adapters[1], replace=True)
    assert_same(answer(bank), alone(base, adapters[1], prompts[0]))
    assert kept(bank) == [tuple(loads)], "the first adapter's prefix is dead"
    loads[0] = take(bank, "p", prompts[1], replace=True)
    assert_same(answer(bank), alone(base, adapters[1], prompts[1]))
    assert kept(bank) == [tuple(loads)]


def test_prefixes_of_replaced_adapters_do_not_stay(base: nn.Module) -> None:
    bank = bank_of(base)
    prompt = take(bank, "p", prompter(base, 3))
    other = take(bank, "other", tenant(base, r=2))
    answer(bank, "other")
    answer(bank, None)
    loads = []
    for _ in range(6):
        loads.append(take(bank, "a", tenant(base, r=4), replace=True))
        answer(bank)
        assert set(kept(bank)) == {(prompt, other), (prompt, 0), (prompt, loads[-1])}
    bank.delete_adapter("a")
    take(bank, "q", prompter(base, 2))
    answer(bank, "other", "q")
    assert (prompt, loads[-1]) not in kept(bank)


def test_a_compiled_model_reads_prompts(base: nn.Module) -> None:
    """Prefixes are looked up and laid into the cache by Python, between what is compiled."""
    bank = bank_of(base)
    take(bank, "a", tenant(base, r=4))
    take(bank, "p", prompter(base, 3))
    inputs = {"input_ids": arange(3, 13).view(2, 5)}
    with bank.use(["a", None], ["p", "p"]), no_grad():
        expected = logits(model_of(bank), inputs)
        compiled = compile(model_of(bank), backend="eager")
        for _ in range(2):
            assert relative_error(compiled(**inputs).logits, expected.double()) < 1e-5


def test_a_model_that_counts_columns_as_positions_reads_no_prompt() -> None:
    """Beside a prompt the row without one would begin at the fourth position."""
    sizes = dict(d_model=32, decoder_layers=1, decoder_ffn_dim=64, decoder_attention_heads=2)
    base = BartForCausalLM(BartConfig(vocab_size=VOCABULARY, encoder_layers=1, **sizes)).eval()
    bank = bank_of(base)
    take(bank, "p", prompter(base, 3))
    with pytest.raises(ValueError, match="model: got BartForCausalLM, whose forward takes no position_ids"):
        answer(bank, None)


def test_a_model_with_a_soft_prompt_of_its_own_is_served() -> None:
    """By arguments without names too."""
    model = base_model()
    add_soft_prompt(model, 3)
    expected = logits(model, ROW)
    bank = AdapterBank(model)
    with no_grad():
        assert_same(model(ROW["input_ids"]).logits, expected)
    take(bank, "a", tenant(base_model(), r=4))
    with bank.use([None]), no_grad():
        assert_same(model(ROW["input_ids"]).logits, expected)
