"""The judge of a call: its short chain for the usual case says what the long one says, and passes over nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad

import fastlora
from fastlora.peft import judge as judging

PARTS = ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
WATCHES: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m, "forward", type(m).forward.__get__(m)),
}


def layer_of(bias: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = nn.Sequential(nn.Linear(8, 12, bias=bias, dtype=dtype))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, **options))
    fastlora.patch(model)
    return model.base_model.model[0]


def judged(layer: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(by the short chain, None where it leaves it to the long one; by the long one alone)."""
    short = judging._usual(layer, x)
    with monkeypatch.context() as patched:
        patched.setattr(judging, "_usual", lambda layer, x: None)
        return short, judging.judge_call(layer, x, (), {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"lora_dropout": 0.1}, {"bias": True, "lora_bias": True}, {"use_rslora": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_case_is_told_alike(
    dtype: torch.dtype, options: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(dtype=dtype, **options).train(training), torch.randn(3, 8, dtype=dtype)
    layer.set_scale("default", 3.0)
    short, long = judged(layer, x, monkeypatch)
    assert short is not None, "the short chain does not know the usual case"
    assert short.base is long.base and short.weight is long.weight and len(short.adapters) == len(long.adapters) == 1
    for mine, wanted in zip(short.adapters[0], long.adapters[0], strict=True):
        assert mine is wanted or (not isinstance(wanted, torch.Tensor) and mine == wanted)


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("part", PARTS)
def test_nobody_who_watches_is_passed_over(part: str, watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(lora_dropout=0.1), torch.randn(3, 8)
    WATCHES[watch](layer.get_submodule(part))
    short, long = judged(layer, x, monkeypatch)
    assert short is None and "hooks" in long


def test_what_is_not_usual_is_left_to_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), torch.randn(3, 8)
    assert judged(layer, x.double(), monkeypatch)[0] is None
    with forward_ad.dual_level():
        short, long = judged(layer, x, monkeypatch)
        assert short is None and "forward-mode" in long
    assert judged(layer, x.as_subclass(type("Odd", (torch.Tensor,), {})), monkeypatch)[0] is None
    layer.update_layer("other", r=3, lora_alpha=1, config=LoraConfig(lora_dropout=0.2))
    layer.set_adapter(["default", "other"])
    short, long = judged(layer, x, monkeypatch)
    assert short is None and len(long.adapters) == 2
    layer.set_adapter(["other"])
    short, long = judged(layer, x, monkeypatch)
    assert short.adapters[0].a is long.adapters[0].a is layer.lora_A["other"].weight and short.adapters[0].p == 0.2
    layer.set_adapter([])
    short, long = judged(layer, x, monkeypatch)
    assert short is None and long.adapters == []
    layer.set_adapter("default")
    layer.merge()
    short, long = judged(layer, x, monkeypatch)
    assert short is None and "merged" in long
