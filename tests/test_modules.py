"""LoRALinear: construction, sharing, merging, saving, and bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_close, assert_same
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastlora
from fastlora import LoRALinear, dispatch


def trained(**kwargs: object) -> LoRALinear:
    """A layer whose update is not zero."""
    layer = LoRALinear(24, 40, r=4, **kwargs)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B.weight)
    if layer.lora_B.bias is not None:
        nn.init.normal_(layer.lora_B.bias)
    return layer


def test_a_new_layer_equals_its_base_and_trains_only_the_adapter() -> None:
    linear = nn.Linear(24, 40)
    layer = LoRALinear.from_linear(linear, r=4, lora_dropout=0.1)
    x = torch.randn(5, 24)
    assert_same(layer.eval()(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A.weight", "lora_B.weight"}
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_equation(dtype: torch.dtype, use_rslora: bool) -> None:
    layer = trained(lora_alpha=12, use_rslora=use_rslora, lora_bias=True, dtype=dtype)
    assert layer.weight.dtype == dtype and layer.lora_A.weight.dtype == torch.float32
    assert layer.scaling == 12 / (math.sqrt(4) if use_rslora else 4)
    x = torch.randn(3, 7, 24).to(dtype)

    def equation(wide: torch.dtype | None) -> torch.Tensor:
        def cast(t: torch.Tensor) -> torch.Tensor:
            return t.detach().to(wide or t.dtype)

        base = nn.functional.linear(cast(x), cast(layer.weight), cast(layer.bias))  # type: ignore[arg-type]
        h = cast(x).to(cast(layer.lora_A.weight).dtype) @ cast(layer.lora_A.weight).t()
        return (base + layer.scaling * (h @ cast(layer.lora_B.weight).t() + cast(layer.lora_B.bias))).to(base.dtype)

    assert_close(layer(x), equation(None), equation(torch.float64), "y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_and_unmerge(dtype: torch.dtype, lora_bias: bool) -> None:
    layer = trained(lora_bias=lora_bias, dtype=dtype).eval()
    x = torch.randn(6, 24).to(dtype)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    before = layer(x)
    layer.merge()
    assert layer.merged and "merged" in repr(layer)
    wide = copy.deepcopy(layer).double()
    wide.unmerge()
    merged_weight = (state["weight"].float() + layer.scaling * state["lora_B.weight"] @ state["lora_A.weight"]).to(
        dtype
    )
    assert_same(layer.weight, merged_weight)
    plain = nn.functional.linear(x, merged_weight, layer.bias)
    assert_close(layer(x), plain, wide(x.double()), "merged")
    for name, t in layer.state_dict().items():
        assert_same(t, state[name])
    layer.train().eval()
    assert layer.merged, "train() and eval() never merge or unmerge"
    layer.unmerge()
    assert not layer.merged
    for name, t in layer.state_dict().items():
        assert_same(t, state[name])
    assert_same(layer(x), before)


def test_merging_one_layer_leaves_those_that_share_its_weight_alone() -> None:
    linear = nn.Linear(24, 40)
    layer, other = (LoRALinear.from_linear(linear, r=2) for _ in range(2))
    nn.init.normal_(layer.lora_B.weight)
    frozen = linear.weight.detach().clone()
    layer.merge()
    assert_same(linear.weight, frozen)
    assert_same(other.weight, frozen)
    assert not torch.equal(layer.weight, frozen)
    layer.unmerge()
    assert layer.weight is linear.weight


def test_merge_states_that_are_refused() -> None:
    layer = trained()
    with pytest.raises(RuntimeError, match="unmerge: the layer is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merge: the layer is merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="load_state_dict: the layer is merged"):
        layer.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="lora_bias and no bias"):
        trained(bias=False, lora_bias=True).merge()


def test_a_layer_moved_while_merged_unmerges_where_it_is() -> None:
    layer = trained()
    frozen = layer.weight.detach().clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert_same(layer.weight, frozen.double())


def test_copies_and_pickles() -> None:
    layer = trained(lora_dropout=0.2)
    x = torch.randn(3, 24)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        torch.manual_seed(0)
        want = layer(x)
        torch.manual_seed(0)
        assert_same(twin(x), want)
    fresh = LoRALinear(24, 40, r=4)
    fresh.load_state_dict(layer.state_dict())
    assert_same(fresh.eval()(x), layer.eval()(x))


def test_a_training_loop_lowers_the_loss_and_moves_only_the_adapter() -> None:
    target = nn.Linear(24, 40)
    layer = LoRALinear.from_linear(nn.Linear(24, 40), r=8, lora_dropout=0.05)
    frozen = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(256, 24)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert_same(layer.weight, frozen)


def test_a_trained_base_gets_its_gradient() -> None:
    layer = trained()
    layer.weight.requires_grad_()
    x = torch.randn(9, 24)
    dy = torch.randn(9, 40)
    layer(x).backward(dy)
    assert_close(layer.weight.grad, dy.t() @ x, dy.double().t() @ x.double(), "dw")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0, wanted a whole number ≥ 1"),
        ({"r": 2.5}, ValueError, "r: got 2.5"),
        ({"r": True}, ValueError, "r: got True"),
        ({"lora_dropout": 1.5}, ValueError, r"lora_dropout: got 1.5, wanted a probability in \[0, 1\)"),
        ({"lora_dropout": None}, TypeError, r"lora_dropout: got NoneType, wanted a number in \[0, 1\)"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: got nan, wanted a finite number"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha: got a whole number that no float holds"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha: got str, wanted a number"),
        ({"lora_alpha": None}, TypeError, "lora_alpha: got NoneType, wanted a number"),
        ({"in_features": -1}, ValueError, "in_features: got -1, wanted a whole number ≥ 0"),
        ({"out_features": "8"}, ValueError, "out_features: got '8', wanted a whole number ≥ 0"),
        ({"dtype": torch.int8}, TypeError, "dtype: got dtype torch.int8, wanted a floating dtype"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype: got dtype torch.float8_e4m3fn, wanted a floating dtype"),
        ({"dtype": "bf16"}, TypeError, "dtype: got dtype bf16"),
    ],
)
def test_bad_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        LoRALinear(**{"in_features": 8, "out_features": 8, **kwargs})


def test_numbers_of_numpys_are_numbers() -> None:
    layer = LoRALinear(np.int64(8), 8, r=np.int64(4), lora_alpha=np.int64(6), lora_dropout=np.float32(0.5))
    assert (layer.r, layer.scaling, layer.lora_dropout) == (4, 1.5, 0.5)
    assert {type(value) for value in (layer.in_features, layer.r, layer.scaling, layer.lora_dropout)} == {int, float}


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A class of its own that computes what its base class does."""


def changed(change: Callable[[nn.Linear], Any]) -> nn.Linear:
    linear = nn.Linear(8, 4)
    change(linear)
    return linear


def bitsandbytes(name: str) -> Any:
    return getattr(pytest.importorskip("bitsandbytes").nn, name)(64, 32, bias=False)


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0]


def hooked(register: str) -> nn.Linear:
    return changed(lambda linear: getattr(linear, register)(lambda *_: None))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another kind": (lambda: nn.Conv1d(2, 2, 1), TypeError, r"got Conv1d, wanted a torch\.nn\.Linear"),
    "a forward of its class's": (lambda: Twice(8, 4), TypeError, "got a Twice, which has a forward of its own"),
    "a forward of its own": (
        lambda: changed(lambda linear: setattr(linear, "forward", torch.relu)),
        ValueError,
        "got a Linear with hooks or a forward of its own",
    ),
    "a hook": (lambda: hooked("register_forward_hook"), ValueError, "with hooks"),
    "a hook ahead": (lambda: hooked("register_forward_pre_hook"), ValueError, "with hooks"),
    "a hook behind": (lambda: hooked("register_full_backward_hook"), ValueError, "with hooks"),
    "a hook ahead of backward": (lambda: hooked("register_full_backward_pre_hook"), ValueError, "with hooks"),
    "weight norm": (lambda: changed(weight_norm), ValueError, "got a ParametrizedLinear with parametrizations"),
    "nf4": (lambda: bitsandbytes("Linear4bit"), TypeError, "weight is a Params4bit, wanted .* fastlora.patch"),
    "int8": (lambda: bitsandbytes("Linear8bitLt"), TypeError, "weight is a Int8Params, wanted .* fastlora.patch"),
    "torchao": (torchao, TypeError, "weight is a .*Tensor.*, wanted .* fastlora.patch"),
    "fp8": (lambda: nn.Linear(8, 4).to(torch.float8_e4m3fn), TypeError, "weight: got dtype torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_from_linear_refuses_what_it_would_not_compute(name: str) -> None:
    make, error, message = REFUSED[name]
    linear = make()
    frozen = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(error, match=rf"^linear: .*{message}"):
        LoRALinear.from_linear(linear)
    assert [p.requires_grad for p in linear.parameters()] == frozen, "it was written to"


def test_from_linear_takes_a_class_that_only_has_a_name_of_its_own() -> None:
    linear, x = Named(8, 4), torch.randn(3, 8)
    assert_same(LoRALinear.from_linear(linear)(x), linear(x))


def test_explain_says_which_path_and_why() -> None:
    layer, x = trained(), torch.randn(3, 24)
    decision = fastlora.explain(layer, x)
    assert decision.path == "torch" and decision.why
    layer.merge()
    assert "merged" in fastlora.explain(layer, x).why
    with pytest.raises(TypeError, match=r"layer: got Linear, wanted a fastlora.LoRALinear"):
        fastlora.explain(nn.Linear(2, 2), x)


def test_explain_knows_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides for the dtype that autocast computes in, as for a patched layer."""
    layer, x = trained(), torch.randn(3, 24)
    monkeypatch.setattr(dispatch.ops, "has_matmul", lambda dtype: dtype != torch.bfloat16)
    assert "no matmul" not in fastlora.explain(layer, x).why
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlora.explain(layer, x).why.endswith("no matmul of bfloat16")


@pytest.mark.parametrize("x", [torch.randn(3, 25), torch.randn(3, 24).half(), torch.ones(3, 24, dtype=torch.int64)])
def test_explain_refuses_what_the_layer_refuses(x: torch.Tensor) -> None:
    layer = trained()
    with pytest.raises((TypeError, ValueError), match=r"^x: got") as refused:
        layer(x)
    with pytest.raises(refused.type, match=re.escape(str(refused.value))):
        fastlora.explain(layer, x)


def test_explain_of_a_layer_on_the_meta_device() -> None:
    decision = fastlora.explain(LoRALinear(24, 40, device="meta"), torch.empty(3, 24, device="meta"))
    assert decision.path == "torch" and "device type 'meta'" in decision.why


@pytest.mark.parametrize("merged", [False, True])
def test_explain_wants_a_tensor_with_features(merged: bool) -> None:
    layer = trained()
    if merged:
        layer.merge()
    with pytest.raises(TypeError, match=r"x: got list, wanted a torch\.Tensor"):
        fastlora.explain(layer, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: got a 0-d tensor, wanted \[\.\.\., K\]"):
        fastlora.explain(layer, torch.tensor(1.0))
