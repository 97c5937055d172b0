"""What is not fused runs PEFT's own forward: told with a reason, to the bit, and fused again when it can be."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import base_model, batch, counted, logits, lora_config, peft_model, step
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from tolerance import assert_same
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastlora
from fastlora import dispatch
from fastlora.peft import path_of, why_not

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_told", set())


VARIANTS = {
    "Dora": {"use_dora": True},
    "ALora": {"alora_invocation_tokens": [5]},
    "Velora": {"velora_config": peft.VeloraConfig(num_groups=4)},
    "Monteclora": {"monteclora_config": lora.MontecloraConfig()},
    "MiCA": {"init_lora_weights": "mica"},
    "Kasa": {"kasa_config": lora.KasaConfig()},
    "BdLora": {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_pefts(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    """Skipped with the variant's name; same numbers as PEFT, gradients too; said once, not once a layer."""
    model, inputs = peft_model("llama", target_modules=["q_proj"], **VARIANTS[variant]).train(), batch()
    ours = copy.deepcopy(model)
    report = fastlora.patch(ours)
    assert not report.patched and len(report.skipped) == 2
    assert all(f"{variant}LinearVariant" in reason for reason in report.skipped.values())
    torch.manual_seed(5)
    with counted() as calls, caplog.at_level(logging.WARNING, "fastlora"):
        actual = step(ours, inputs)
        assert calls == (0, 0)
    torch.manual_seed(5)
    expected = step(model, inputs)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_same(value, expected[name])
    (record,) = [record for record in caplog.records if record.name == "fastlora"]
    assert "self_attn.q_proj falls back" in record.getMessage() and variant in record.getMessage()
    with pytest.raises(RuntimeError, match=r"strict=True(.|\n)*q_proj"):
        fastlora.patch(ours, strict=True)


def test_a_variant_beside_a_plain_adapter() -> None:
    """Only layers where the variant is active fall back."""
    model, inputs = peft_model(), batch()
    model.add_adapter("dora", lora_config(use_dora=True, target_modules=["q_proj"]))
    fastlora.patch(model)
    with counted() as calls:
        logits(model, inputs)
        assert calls == (14, 0)
        model.base_model.set_adapter(["default", "dora"])
        logits(model, inputs)
        assert calls == (14 + 12, 0)


@pytest.mark.parametrize(
    "kind, target",
    [("Embedding", "embed"), ("Conv1d", "conv1d"), ("Conv2d", "conv2d"), ("MultiheadAttention", "attention")],
)
def test_other_kinds_of_layer_are_named_and_left(kind: str, target: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear = nn.Embedding(8, 8), nn.Linear(8, 8)
            self.conv1d, self.conv2d = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2)

    model = get_peft_model(Model(), LoraConfig(target_modules=["linear", target], r=2))
    report = fastlora.patch(model)
    assert report.patched == {"base_model.model.linear": "fused"}
    assert report.skipped[f"base_model.model.{target}"] == f"PEFT's {kind} is not a layer that fastlora takes"
    assert type(getattr(model.base_model.model, target)) is getattr(lora.layer, kind)
    if kind == "MultiheadAttention":  # PEFT wraps its out_proj too, and never calls that layer's forward
        assert "NonDynamically" in report.skipped["base_model.model.attention.base_layer.out_proj"]


def test_target_parameters_are_left() -> None:
    config = LoraConfig(target_parameters=["layers.0.mlp.up_proj.weight"], target_modules=["q_proj"], r=2)
    model = get_peft_model(base_model(), config)
    report = fastlora.patch(model)
    assert len(report.patched) == 2
    assert list(report.skipped.values()) == ["PEFT's ParamWrapper is not a layer that fastlora takes"]


def hook_base(layer: Any) -> Callable[[], Any]:
    return layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y).remove


def hook_before_a(layer: Any) -> Callable[[], Any]:
    return layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (3 * args[0],)).remove


def hook_b_backward(layer: Any) -> Callable[[], Any]:
    handle = layer.lora_B["default"].register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    return handle.remove


def hook_dropout(layer: Any) -> Callable[[], Any]:
    return layer.lora_dropout["default"].register_forward_hook(lambda module, args, y: -y).remove


def hook_everything(layer: Any) -> Callable[[], Any]:
    return nn.modules.module.register_module_forward_hook(lambda module, args, y: None).remove


def hook_accelerate(layer: Any) -> Callable[[], Any]:
    add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu"))
    return lambda: delattr(layer.base_layer, "forward")


def replace_forward(layer: Any) -> Callable[[], Any]:
    layer.forward = lambda x, *args, **kwargs: 2 * type(layer).forward(layer, x, *args, **kwargs)
    return lambda: delattr(layer, "forward")


def shard_plan(layer: Any) -> Callable[[], Any]:
    layer.base_layer._hf_tp_plan = "colwise"
    return lambda: delattr(layer.base_layer, "_hf_tp_plan")


def parametrise(layer: Any) -> Callable[[], Any]:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Double())
    return lambda: nn.utils.parametrize.remove_parametrizations(layer.base_layer, "weight", leave_parametrized=False)


def custom_a(layer: Any) -> Callable[[], Any]:
    class Thin(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    old = layer.lora_A["default"]
    layer.lora_A["default"] = Thin(old.in_features, old.out_features, bias=False)
    layer.lora_A["default"].weight = old.weight
    return lambda: layer.lora_A.update({"default": old})


def custom_dropout(layer: Any) -> Callable[[], Any]:
    old = layer.lora_dropout["default"]
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)
    return lambda: layer.lora_dropout.update({"default": old})


def drop_everything(layer: Any) -> Callable[[], Any]:
    old = layer.lora_dropout["default"]
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    return lambda: layer.lora_dropout.update({"default": old})


STATES = {
    hook_base: "base_layer has hooks",
    hook_before_a: "adapter 'default' has hooks",
    hook_b_backward: "adapter 'default' has hooks",
    hook_dropout: "adapter 'default' has hooks",
    hook_everything: "global module hooks",
    hook_accelerate: "base_layer has hooks, or a forward of its own",
    replace_forward: "its forward was replaced on the instance",
    shard_plan: "tensor-parallel",
    parametrise: "ParametrizedLinear",
    custom_a: "made of Thin, Linear, Identity",
    custom_dropout: "made of Linear, Linear, AlphaDropout",
    drop_everything: "drops everything (p = 1.0)",
}


@pytest.mark.parametrize("enter", STATES, ids=lambda f: f.__name__)
def test_a_state_that_fusing_would_miss(enter: Callable[[Any], Callable[[], Any]]) -> None:
    """While it lasts PEFT's forward runs, with PEFT's results to the bit; the report says why; then we are back."""
    model, inputs = peft_model("llama", target_modules=["q_proj"], layers_to_transform=[0]), batch()
    ours = copy.deepcopy(model)
    fastlora.patch(ours)
    leave = enter(ours.get_submodule(Q))
    leave_theirs = enter(model.get_submodule(Q))
    report = fastlora.patch(ours)
    assert STATES[enter] in report.skipped[Q] and path_of(ours.get_submodule(Q)) == ("peft", report.skipped[Q])
    with counted() as calls:
        actual, expected = step(ours, inputs), step(model, inputs)
        assert calls == (0, 0)
        for name, value in actual.items():
            assert_same(value, expected[name])
        leave()
        leave_theirs()
        assert why_not(ours.get_submodule(Q)) is None
        step(ours, inputs)
        assert calls == (1, 0)


def test_a_state_found_when_patching_ends_too() -> None:
    """A layer that is hooked while it is patched is skipped with its reason, and fused once the hook is gone."""
    model = peft_model("llama", target_modules=["q_proj"], layers_to_transform=[0])
    leave = hook_base(model.get_submodule(Q))
    assert fastlora.patch(model).skipped
    leave()
    with counted() as calls:
        logits(model, batch())
    assert calls == (1, 0)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.proj(x, *args, **kwargs)


def holder(**options: Any) -> nn.Module:
    model = get_peft_model(Holder(), LoraConfig(target_modules=["proj"], r=2, init_lora_weights=False, **options))
    fastlora.patch(model)
    return model


def test_arguments_for_the_base_layer_reach_it() -> None:
    model = holder()
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        model(torch.randn(3, 8), size=3)


def test_alora_offsets_are_taken_and_mean_nothing_here() -> None:
    model, x = holder(), torch.randn(3, 8)
    with counted() as calls:
        assert_same(model.base_model.model(x, alora_offsets=[1, 2, 3], adapter_names=None), model(x))
    assert calls == (2, 0)


def test_a_dtype_that_peft_refuses_is_refused_by_peft() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        holder()(torch.randn(3, 8, dtype=torch.float64))


def test_disabled_input_casting() -> None:
    model = holder()
    layer = model.base_model.model.proj
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    x = torch.randn(3, 8)
    assert model(x).dtype == torch.float32
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(x)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"x: got shape \(3, 7\)"):
        holder()(torch.randn(3, 7))


def test_torch_func_meets_pefts_forward() -> None:
    """Gradients row by row, which torch.func takes through plain torch alone."""
    model, inputs = peft_model(layers=1).eval(), batch()
    ours = copy.deepcopy(model)
    report = fastlora.patch(ours)

    def by_row(model: nn.Module) -> dict[str, Tensor]:
        def loss(trained: dict[str, Tensor], ids: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(
                model, trained, (), {"input_ids": ids[None], "labels": ids[None]}
            ).loss
            return out

        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, inputs["input_ids"])

    with counted() as calls:
        actual, expected = by_row(ours), by_row(model)
        assert calls == (0, 0) and len(report.patched) == 7
    for name, grad in actual.items():
        assert_same(grad, expected[name])


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_meets_pefts_forward(grad: bool) -> None:
    """Tangents, which no op of ours carries; with the level left, ours run again."""
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    ours, x, dx = copy.deepcopy(model), torch.randn(3, 8), torch.randn(3, 8)
    fastlora.patch(ours)
    with counted() as calls, torch.set_grad_enabled(grad):
        tangents = []
        for each in (ours, model):
            with forward_ad.dual_level():
                tangents.append(forward_ad.unpack_dual(each(forward_ad.make_dual(x, dx))).tangent)
        assert calls == (0, 0)
        ours(x)
        assert calls == (1, 0)
    assert_same(*tangents)
    assert tangents[0].abs().max() > 0
