"""Whose batch is served: each bank's own, each task's own, the innermost, and only for rows that are the requests'."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch
from banked import bank_of, model_of, prompter, take, tenant
from models import base_model, logits
from peft import PeftModel
from tolerance import assert_same, relative_error
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, XLNetConfig, XLNetLMHeadModel

from fastlora import AdapterBank, MultiLoRALinear, groups, serving

IDS = {"input_ids": torch.arange(3, 13).view(2, 5)}


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str, PeftModel]:
    return {"a": tenant(base, r=4), "b": tenant(base, r=7)}


def bank_with(base: nn.Module, tenants: dict[str, PeftModel], **options: Any) -> AdapterBank:
    bank = bank_of(base, **options)
    for name, model in tenants.items():
        take(bank, name, model)
    return bank


def assert_served(output: Tensor, model: nn.Module, inputs: dict[str, Tensor] = IDS) -> None:
    assert relative_error(output, logits(model, inputs).double()) < 1e-5


def test_two_banks_serve_their_own_batches(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """A target and a draft model, say: neither sees the other's batch, in whatever order they are entered."""
    draft = base_model(layers=1)
    others = {"d": tenant(draft, r=4)}
    first, second = bank_with(base, tenants), bank_with(draft, others)
    with first.use(["a", "a"]):
        assert_same(logits(model_of(second), IDS), logits(draft, IDS))
        with second.use(["d", "d"]):
            assert_served(logits(model_of(first), IDS), tenants["a"])
            assert_served(logits(model_of(second), IDS), others["d"])
    second.prepare([second.slot("d")] * 10)
    with first.use(["a", "a"]):
        assert_served(logits(model_of(second), IDS), others["d"])
    second.prepare(None)


def test_prompts_are_read_under_their_own_banks_adapters(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    first, second = bank_with(base, tenants), bank_with(base, tenants)
    take(first, "p", prompter(base, 3))
    with first.use(["a", "a"], ["p", None]):
        alone = logits(model_of(first), IDS)
    first._prompts._prefixes.clear()
    with first.use(["a", "a"], ["p", None]), second.use(["b", "b"]):
        assert_same(logits(model_of(first), IDS), alone)


def test_the_inner_use_replaces_adapters_and_prompts(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_with(base, tenants)
    take(bank, "p", prompter(base, 3))
    model = model_of(bank)
    with bank.use(prompt_names=["p", "p"]):
        outer = logits(model, IDS)
        assert not torch.equal(outer, logits(base, IDS))
        with bank.use(["a", "a"]):
            assert_served(logits(model, IDS), tenants["a"])
        for nobody in (None, [None, None]):
            with bank.use(nobody):
                assert_same(logits(model, IDS), logits(base, IDS))
        assert_same(logits(model, IDS), outer)


def test_tasks_of_one_loop_have_batches_of_their_own(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_with(base, tenants)
    take(bank, "p", prompter(base, 3))
    model, alone = model_of(bank), {}
    requests = [(["a"] * 2, None), (["b"] * 2, None), (["a"] * 2, ["p"] * 2)]
    for at, (loras, prompts) in enumerate(requests):
        with bank.use(loras, prompts):
            alone[at] = logits(model, IDS)

    async def serve(at: int, turns: int) -> Tensor:
        with bank.use(*requests[at]):
            for _ in range(turns):
                await asyncio.sleep(0)
            return logits(model, IDS)

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*(serve(at, turns) for at, turns in ((0, 3), (1, 5), (2, 1))))

    for at, output in enumerate(asyncio.run(all_at_once())):
        assert_same(output, alone[at])
    assert_same(logits(model, IDS), logits(base, IDS))


def test_a_task_that_outlives_its_batch_is_refused(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """Begun inside, a task has the batch; the slots may be another's by the time that it has ended."""
    bank = bank_with(base, tenants)

    async def late(ended: asyncio.Event) -> None:
        assert_served(logits(model_of(bank), IDS), tenants["a"])
        await ended.wait()
        with pytest.raises(RuntimeError, match="got a call after its end"):
            logits(model_of(bank), IDS)
        with bank.use(["b", "b"]):
            assert_served(logits(model_of(bank), IDS), tenants["b"])

    async def outlived() -> None:
        ended = asyncio.Event()
        with bank.use(["a", "a"]):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        await task

    asyncio.run(outlived())


def test_rows_are_the_requests(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """forward takes a row for each; generate too, and multiplies them itself."""
    bank = bank_with(base, tenants)
    model, four = model_of(bank), {"input_ids": torch.arange(3, 23).view(4, 5)}
    for names in (["a"], ["a", None], ["a"] * 8):
        with bank.use(names), pytest.raises(ValueError, match=f"got 4 rows, wanted the batch's {len(names)}"):
            logits(model, four)
        with bank.use(names), pytest.raises(ValueError, match=f"got 4 rows, wanted the batch's {len(names)}; generate"):
            model.generate(four["input_ids"], max_new_tokens=2)
    options = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    with bank.use(["a", None]):
        beams = model.generate(IDS["input_ids"], **options)
    assert_same(beams[:2], tenants["a"].generate(input_ids=IDS["input_ids"][:1], **options))
    assert_same(beams[2:], base.generate(IDS["input_ids"][1:], **options))


def test_the_encoder_by_itself_takes_a_row_for_each_request() -> None:
    base = base_model("t5")
    bank = bank_with(base, {"a": tenant(base, "t5", r=4)})
    with bank.use(["a"]), pytest.raises(ValueError, match="got 2 rows, wanted the batch's 1"):
        model_of(bank).get_encoder()(**IDS)


def test_models_whose_rows_do_not_begin_with_the_requests_are_refused() -> None:
    """XLNet's layers take the tokens first: whoever shares a batch would get his neighbours' rows."""
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=64, dropout=0.0, pad_token_id=0)
    model = XLNetLMHeadModel(config).eval()
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"got 2 layers .* \(3, 2, 32\) for 2 requests of 3 tokens.*target_modules: trans"
    ):
        AdapterBank(model)
    assert dict(model.named_modules()) == before


def test_layers_of_a_model_that_cannot_be_traced_refuse_rows_of_nobody(
    base: nn.Module, tenants: dict[str, PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens first, or tokens picked by a router: the layer cannot know whose they are."""
    monkeypatch.setattr(groups, "trace", lambda *_, **__: ([], "it counts"))
    bank = bank_with(base, tenants)
    layer = next(m for m in model_of(bank).modules() if isinstance(m, MultiLoRALinear))
    with bank.use(["a", None]):
        assert_served(logits(model_of(bank), IDS)[:1], tenants["a"], {"input_ids": IDS["input_ids"][:1]})
        (turn,) = [turn for turn in serving._turns.get() if turn.tables is bank._attached.tables][-1:]
        for shape in ((4, 2, 64), (4, 64), (2, 64)):
            with serving.again(turn, rows=2), pytest.raises(ValueError, match="cannot be known"):
                layer(torch.zeros(shape))
        with serving.again(turn, rows=2):
            assert layer(torch.zeros(2, 3, 64)).shape == (2, 3, 64)


def test_layers_that_take_the_batch_in_one_dimension_are_served(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    """OPT, say, flattens requests and tokens, in their order."""

    class Flat(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x.flatten(0, 1)).view_as(x)

    flattened = copy.deepcopy(base)
    bank = bank_with(base, tenants)
    with bank.use(["a", None]):
        expected = logits(model_of(bank), IDS)
    for block in flattened.model.layers:
        block.mlp.forward = Flat(type(block.mlp).forward.__get__(block.mlp)).forward
    bank = bank_with(flattened, tenants)
    with bank.use(["a", None]):
        assert relative_error(logits(model_of(bank), IDS), expected.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_of_any_dtype_can_be_looked_at(dtype: torch.dtype) -> None:
    """Experts are beside, their shared one takes tokens in one dimension; torch tells a grouped product's shape in bf16
    alone, and without a run of the model nobody's rows are known."""
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    base = Qwen2MoeForCausalLM(config).eval().to(dtype)
    bank = AdapterBank(copy.deepcopy(base))
    assert sorted(len(group.members) for group in bank._attached.groups) == [1] * 6 + [2] * 2 + [3] * 2
    if dtype is torch.float32:
        models = [tenant(base, r=4, target_modules=["q_proj", "down_proj"]) for _ in range(2)]
        for name, model in zip("ab", models, strict=True):
            take(bank, name, model)
        with bank.use(["a", "b"]):
            mixed = logits(model_of(bank), IDS)
        for row, model in enumerate(models):
            assert_served(mixed[row : row + 1], model, {"input_ids": IDS["input_ids"][row : row + 1]})


def test_the_base_alone_compiles_to_one_graph(base: nn.Module, tenants: dict[str, PeftModel]) -> None:
    bank = bank_with(base, tenants)
    torch._dynamo.reset()
    compiled = torch.compile(model_of(bank), backend="eager", fullgraph=True)
    for mapping in (False, True):
        if mapping:
            bank.prepare([-1] * 10)
            bank.prepare(None)
        assert_same(logits(compiled, IDS), logits(base, IDS))
        with bank.use(["a", "a"]):
            assert_served(logits(model_of(bank), IDS), tenants["a"])
        assert bank._attached.tables.said == 0
