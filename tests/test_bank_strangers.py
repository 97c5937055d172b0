"""Rows that are no requests, and calls that are nobody's: images, a generate of other rows, recomputing, streams."""

from __future__ import annotations

import contextvars
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from banked import bank_with, model_of, prompter, rows, take, tenant
from models import base_model, logits
from tolerance import assert_same, relative_error
from torch import Tensor, nn

from fastlora import AdapterBank, Jobs

IDS = torch.arange(3, 13).view(2, 5)
TARGETS = ["q_proj", "v_proj"]
IMAGE = 63


@pytest.fixture(scope="module")
def llava() -> transformers.PreTrainedModel:
    """A Llama beside a CLIP tower, whose layers bear the same names."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tower = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=64, pad_token_id=0, **sizes)
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def seen(images: tuple[int, int]) -> dict[str, Tensor]:
    """Two requests and how many images, of four tokens each, each of them has."""
    ids = torch.arange(3, 51).view(2, 24).clone()
    for row, count in enumerate(images):
        ids[row, 2 : 2 + 4 * count] = IMAGE
    pixels = torch.randn(sum(images), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_images_are_not_requests(llava: transformers.PreTrainedModel) -> None:
    """Two images of the first request were served as both requests', with the second's adapter."""
    one = tenant(llava, r=4, target_modules=TARGETS)
    bank = AdapterBank(copy.deepcopy(llava), target_modules=TARGETS)
    take(bank, "a", one)
    take(bank, "b", tenant(llava, r=4, target_modules=TARGETS))
    for images in ((2, 0), (4, 0), (1, 1)):
        with bank.use(["a", "b"]):
            with pytest.raises(ValueError, match="does not call, wanted one adapter for all requests"):
                model_of(bank)(**seen(images))
            with pytest.raises(ValueError, match="does not call, wanted one adapter for all requests"):
                model_of(bank).generate(**seen(images), max_new_tokens=1)
    with bank.use(["a", "a"]):
        both = logits(model_of(bank), seen((2, 0)))
    assert relative_error(both, logits(one, seen((2, 0))).double()) < 1e-5
    text = AdapterBank(copy.deepcopy(llava), target_modules=r".*language_model.*\.(q_proj|v_proj)")
    only = r".*language_model.*\.(q_proj|v_proj)"
    models = {name: tenant(llava, r=4, target_modules=only) for name in "ab"}
    for name, model in models.items():
        take(text, name, model)
    with text.use(["a", "b"]):
        mixed = logits(model_of(text), seen((2, 0)))
    for row, model in enumerate(models.values()):
        assert relative_error(mixed[row], logits(model, seen((2, 0)))[row].double()) < 1e-5


def test_images_are_no_jobs_rows(llava: transformers.PreTrainedModel) -> None:
    model = copy.deepcopy(llava)
    jobs = Jobs(model, target_modules=TARGETS)
    jobs.add("a", r=4)
    jobs.add("b", r=4)
    with jobs.use(["a", "b"]), pytest.raises(ValueError, match="these may be tokens first, images"):
        model(**seen((2, 0)))
    with jobs.use(["a", "a"]):
        model(**seen((2, 0))).logits.sum().backward()
    assert all(p.grad is None for p in jobs.parameters("b"))


@pytest.fixture(scope="module")
def tenants(base: nn.Module) -> dict[str | None, nn.Module]:
    return {None: base, "a": tenant(base, r=4), "b": tenant(base, r=7)}


def test_a_generate_whose_requests_leave_is_refused(base: nn.Module, tenants: dict[str | None, nn.Module]) -> None:
    """Whisper's long form goes on with the requests that are not done: two beams of one would be two requests."""
    model: Any = copy.deepcopy(base)

    def generate(inputs: Tensor, left: Tensor) -> None:
        for ids in (inputs, inputs.repeat_interleave(2, 0), left):
            served(input_ids=ids)

    model.generate = generate
    bank = bank_with({**tenants, None: model})
    served = model_of(bank)
    with bank.use(["a", "b"]):
        served.generate(IDS, IDS.repeat_interleave(2, 0))
        with pytest.raises(ValueError, match="got 2 rows after 4 in one generate, wanted as many: requests have left"):
            served.generate(IDS, IDS)
        served.generate(IDS, IDS.repeat_interleave(2, 0))


@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching"])
def test_batching_of_the_models_own_is_refused(tenants: dict[str | None, nn.Module], method: str) -> None:
    """It runs in a thread of its own, where no batch is said: every request would be the base's."""
    bank = bank_with(tenants)
    own = getattr(model_of(bank), method)
    with bank.use(["a"]), pytest.raises(RuntimeError, match=f"{method}: got a call inside of use"):
        own([[3, 4, 5]])
    bank.prepare([bank.slot("a")] * 5)
    with pytest.raises(RuntimeError, match=f"{method}: got a call inside of use or after prepare"):
        own([[3, 4, 5]])
    bank.close()
    assert getattr(model_of(bank), method).__func__ is getattr(type(model_of(bank)), method)


def test_recomputing_outside_of_use_is_refused(tenants: dict[str | None, nn.Module]) -> None:
    """Reentrant checkpointing runs a layer again in backward, where the base alone would be differentiated."""
    bank = bank_with(tenants)
    model = model_of(bank).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    x = torch.randn(2, 5, model.config.hidden_size)

    def loss(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.square().sum()

    inside, outside = (x.clone().requires_grad_() for _ in range(2))
    with bank.use(["a", "b"]):
        loss(inside).backward()
        late = loss(outside)
    with pytest.raises(RuntimeError, match="outside of use; call backward inside of it"):
        late.backward()
    assert inside.grad is not None and bool(inside.grad.isfinite().all())
    bank.delete_adapter("a")
    bank.delete_adapter("b")
    loss(x.clone().requires_grad_()).backward()  # of the base alone nothing can be mistaken
    model.gradient_checkpointing_disable()
    model.eval()


def test_streams_that_take_turns_say_so(tenants: dict[str | None, nn.Module]) -> None:
    """Two generators inside of use: the first is served by the second's adapter, and ends with an error."""
    bank = bank_with(tenants)

    def stream(name: str) -> Iterator[Tensor]:
        with bank.use([name]):
            for _ in range(2):
                yield logits(model_of(bank), {"input_ids": IDS[:1]})

    for each in ("a", "b"):
        assert_same(*stream(each))
    first, second = stream("a"), stream("b")
    for each_in_turn in (first, second, first, second):
        next(each_in_turn)
    with pytest.raises(RuntimeError, match="use: ended where another is the innermost"):
        next(first)
    assert not list(second)
    elsewhere = stream("a")
    contextvars.copy_context().run(next, elsewhere)
    next(elsewhere)
    with pytest.raises(RuntimeError, match="use: ended where another is the innermost, or none"):
        next(elsewhere)
    assert_same(*stream("b"))  # and nothing has stayed behind
    assert relative_error(next(stream("b")), logits(tenants["b"], {"input_ids": IDS[:1]}).double()) < 1e-5


def test_what_a_hook_has_kept_stays() -> None:
    """An output that a hook on the base layer keeps is added to nowhere."""
    base = base_model()
    models = {None: base, "a": tenant(base, r=4)}
    bank = bank_with(models)
    kept = []
    for layer in bank._attached.layers.values():
        layer.base_layer.register_forward_hook(lambda module, args, y: kept.append((y, y.clone())))
    with bank.use(["a", "a"]):
        logits(model_of(bank), {"input_ids": IDS})
    assert kept
    for y, then in kept:
        assert_same(y, then)


def test_copies_files_and_changes_of_a_served_model_are_refused(tmp_path: Path) -> None:
    """A copy would be the base inside of `use` too, and a PeftModel's file would have no adapter in it."""
    peft = tenant(base_model(), r=4)
    bank = AdapterBank(peft)
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="model: got one that a bank serves, to copy or to pickle"):
            make(peft)
    for model in (peft, peft.get_base_model()):
        with pytest.raises(RuntimeError, match="save_pretrained: got a call while a bank has the model's layers"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    for change in (lambda: peft.set_adapter("default"), lambda: peft.delete_adapter("default"), peft.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"\w+: got a call while a bank has the model's layers"):
            change()
    bank.close()
    copy.deepcopy(peft).save_pretrained(tmp_path)
    peft.merge_and_unload()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_prompts_before_routed_experts(base: nn.Module) -> None:
    """A config that asks for the routers' auxiliary loss asks in vain: transformers fails on virtual tokens' mask."""
    config = transformers.MixtralConfig(
        **{name: getattr(base.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, sliding_window=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    peft = prompter(model, 3)
    ids = torch.randint(0, config.vocab_size, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1}
    expected = [model(**rows(inputs, 0), labels=ids[:1]), peft(**rows(inputs, 1), labels=ids[1:], use_cache=False)]
    assert expected[0].aux_loss > 0
    bank = AdapterBank(model, target_modules=["q_proj"])
    take(bank, "p", peft)
    with torch.no_grad(), bank.use(None, [None, "p"]):
        found = model(**inputs)
        for row, alone in enumerate(expected):
            assert relative_error(found.logits[row : row + 1], alone.logits[:, -7:].detach().double()) < 1e-5
        with pytest.raises(ValueError, match="output_router_logits: got True, wanted False in a batch"):
            model(**inputs, output_router_logits=True)
