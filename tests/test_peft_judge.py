"""The judge of a call: its short chain for the usual case says what the long one says, and passes over nobody."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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


def biased(layer: Any) -> torch.Tensor:
    layer.lora_A["default"].bias = nn.Parameter(torch.randn(2))
    extra: torch.Tensor = layer.lora_A["default"].bias
    return extra


def scaled_by_feature(layer: Any) -> torch.Tensor:
    extra = layer.scaling["default"] = torch.rand(12).requires_grad_()
    return extra


@pytest.mark.parametrize("change, why", [(biased, "lora_A.*has a bias"), (scaled_by_feature, "scaling.*a tensor of")])
def test_an_adapter_that_is_more_than_two_factors_and_a_number_is_pefts(
    change: Callable[[Any], torch.Tensor], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(), torch.randn(3, 8)
    extra = change(layer)
    short, long = judged(layer, x, monkeypatch)
    assert short is None and re.search(why, long)
    expected = super(type(layer), layer).forward(x)
    actual = layer(x)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), extra)[0] for y in (actual, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rows", [3, 2**15])
@pytest.mark.parametrize("scaling", [float("nan"), float("inf")])
def test_a_scaling_that_is_no_number_is_pefts(scaling: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN from both, of few rows and of many: training that has gone wrong is for its own loop to see."""
    layer, x = layer_of(), torch.randn(rows, 8)
    layer.scaling["default"] = scaling
    short, long = judged(layer, x, monkeypatch)
    assert short is None and f"is {scaling}" in long
    torch.testing.assert_close(layer(x), super(type(layer), layer).forward(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("training", [True, False])
def test_complex_layers_are_pefts(dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(dtype=dtype).train(training), torch.randn(3, 8, dtype=dtype)
    short, long = judged(layer, x, monkeypatch)
    assert short is None and f"{dtype}" in long
    assert torch.equal(layer(x), super(type(layer), layer).forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_adapters_on_a_narrower_base_are_pefts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops would compute their update in fp32, PEFT does in float64."""
    layer, x = layer_of(dtype=dtype), torch.randn(3, 8, dtype=dtype)
    layer.lora_A.double(), layer.lora_B.double()
    short, long = judged(layer, x, monkeypatch)
    assert short is None and "an adapter is float64" in long
    sides = []
    for y in (layer(x), super(type(layer), layer).forward(x)):
        sides.append((y, *torch.autograd.grad(y.sum(), [layer.lora_A.default.weight, layer.lora_B.default.weight])))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*sides, strict=True))
    layer.base_layer.double()
    assert judged(layer, x.double(), monkeypatch)[0] is not None


def test_a_dropout_in_place_changes_x_for_who_reads_it_next(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(lora_dropout=0.5).train(), torch.ones(3, 8)
    layer.lora_dropout["default"].inplace = True
    short, long = judged(layer, x, monkeypatch)
    assert short is None and "in place" in long
    layer(x)
    assert set(x.flatten().tolist()) == {0.0, 2.0}


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": torch.Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "_mkldnn": torch.Tensor.to_mkldnn,
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta) st.*:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_x_of_another_layout_is_pefts(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), LAYOUTS[layout](torch.randn(4096, 8))
    short, long = judged(layer, x, monkeypatch)
    assert short is None and layout in long
    with torch.set_grad_enabled(layout != "_mkldnn"):  # which has no backward here
        ys = layer(x), super(type(layer), layer).forward(x)
    parts = [y.unbind() if y.is_nested else [y.to_dense()] for y in ys]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*parts, strict=True))
    if layout != "_mkldnn":
        a = layer.lora_A["default"].weight
        gradients = [torch.autograd.grad(sum(y.square().sum() for y in part), a)[0] for part in parts]
        assert torch.equal(*gradients)


def doubled(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    old = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * old(*args, **kwargs))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return 2 * out if func is functional.linear else out


@pytest.mark.parametrize("owner, name", [(owner, name) for owner, name, _ in judging.PASSED_OVER])
def test_what_others_put_in_place_of_a_function_is_called(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(lora_dropout=0.5), torch.randn(3, 8)
    with monkeypatch.context() as patched:
        doubled(patched, owner, name)
        short, long = judged(layer, x, monkeypatch)
        assert short is None and f"{owner.__name__}.{name} was replaced" in long
        torch.manual_seed(0)
        actual = layer(x)
        torch.manual_seed(0)
        assert torch.equal(actual, super(type(layer), layer).forward(x))
    assert judged(layer, x, monkeypatch)[0] is not None


@pytest.mark.parametrize("owner, name", [(owner, name) for owner, name, _ in judging.PASSED_OVER])
def test_what_others_put_there_before_fastlora_was_imported_is_called(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed and Unsloth may: a wrapper is known whatever name it gives itself."""
    assert (owner, name, getattr(owner, name)) in judging.PASSED_OVER
    layer, x, old = layer_of(), torch.randn(3, 8), getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(old)(lambda *args, **kwargs: 2 * old(*args, **kwargs)))
    as_imported = [(each, its, judging.librarys(each, its)) for each, its, _ in judging.PASSED_OVER]
    monkeypatch.setattr(judging, "PASSED_OVER", as_imported)
    short, long = judged(layer, x, monkeypatch)
    assert short is None and f"{owner.__name__}.{name} was replaced (before" in long
    assert torch.equal(layer(x), super(type(layer), layer).forward(x))


def test_a_function_mode_sees_the_functions_and_a_default_device_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = layer_of(), torch.randn(3, 8)
    expected = layer(x)
    with torch.device("cpu"):
        assert judged(layer, x, monkeypatch)[0] is not None
        with Doubling():
            short, long = judged(layer, x, monkeypatch)
            assert short is None and "Doubling" in long
            assert not torch.allclose(layer(x), expected)


def test_a_function_that_is_replaced_later_is_seen_by_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(), torch.randn(3, 8)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    doubled(monkeypatch, nn.Linear, "forward")
    torch.testing.assert_close(compiled(x), layer(x))
