"""LoRALinear: construction, sharing, merging, saving, and bad input."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from tolerance import assert_close, assert_same
from torch import nn

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
    ("kwargs", "message"),
    [
        ({"r": 0}, "r: got 0, wanted a whole number ≥ 1"),
        ({"r": 2.5}, "r: got 2.5"),
        ({"lora_dropout": 1.0}, r"dropout_p: got 1.0, wanted a probability in \[0, 1\)"),
        ({"lora_alpha": float("nan")}, "scaling: got nan"),
    ],
)
def test_bad_construction(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(8, 8, **kwargs)  # type: ignore[arg-type]


def test_from_linear_wants_a_linear() -> None:
    with pytest.raises(TypeError, match=r"linear: got Conv1d, wanted a torch\.nn\.Linear"):
        LoRALinear.from_linear(nn.Conv1d(2, 2, 1))  # type: ignore[arg-type]


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
