"""Soft prompts in models that place or mask tokens by the images among them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from banked import prompter, take
from models import logits
from tolerance import relative_error
from torch import Tensor, nn

from fastlora import AdapterBank

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
PROMPTS = ["p", None]
IMAGE, START = 60, 61


def drawn(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.15)
    return model.eval()


def qwen() -> Any:
    text = dict(SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    tower = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2)
    ids = dict(image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=62, video_token_id=63)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **ids)
    return drawn(transformers.Qwen2VLForConditionalGeneration(config))


def seen() -> dict[str, Tensor]:
    """Two requests with an image of four tokens each."""
    ids = torch.randint(3, IMAGE, (2, 12))
    ids[:, 2], ids[:, 3:7] = START, IMAGE
    grid = torch.tensor([[1, 4, 4]]).expand(2, -1)
    pixels = torch.randn(32, 96)
    kinds = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": ids * 0 + 1, "pixel_values": pixels, "image_grid_thw": grid,
            "mm_token_type_ids": kinds}  # fmt: skip


def with_prompt(model: nn.Module) -> AdapterBank:
    bank = AdapterBank(model, target_modules=r".*language_model.*q_proj")
    take(bank, "p", prompter(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 3))  # as wide
    return bank


def test_positions_by_images_are_the_models_own() -> None:
    base, inputs, options = qwen(), seen(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    model = copy.deepcopy(base)
    bank = with_prompt(model)
    with bank.use(None, PROMPTS):
        assert torch.equal(model.generate(**inputs, **options)[1], base.generate(**inputs, **options)[1])
        with pytest.raises(ValueError, match="position_ids: got none beside image_grid_thw"):
            logits(model, inputs)
        kinds = {key: inputs[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        positions = model.model.get_rope_index(**kinds)[0]
        ours = logits(model, inputs | {"position_ids": positions})
    assert relative_error(ours[1], logits(base, inputs)[1].double()) < 1e-5


def test_images_of_a_batch_before_move_no_virtual_token() -> None:
    """The model keeps how far its last images moved positions, and would count those of embeddings by it."""
    model, inputs = qwen(), seen()
    text = {key: inputs[key].clamp(max=IMAGE - 1) for key in ("input_ids", "attention_mask")}
    bank = with_prompt(model)
    with bank.use(None, PROMPTS):
        expected = logits(model, text)
    for key in [*bank._prompts._prefixes]:
        del bank._prompts._prefixes[key]
    logits(model, inputs)
    with bank.use(None, PROMPTS):
        assert relative_error(logits(model, text), expected.double()) < 1e-5


def test_tokens_that_attend_to_later_ones_refuse_prompts() -> None:
    text = dict(SIZES, model_type="gemma", num_key_value_heads=2, head_dim=8)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    tower = dict(sizes, model_type="siglip_vision_model", image_size=8, patch_size=4, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    model = drawn(transformers.PaliGemmaForConditionalGeneration(config))
    bank = with_prompt(model)
    ids = torch.randint(3, IMAGE, (2, 6))
    with bank.use(None, PROMPTS), pytest.raises(ValueError, match="token_type_ids: got some, by which PaliGemma"):
        logits(model, {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})
