"""One patched layer against PEFT's own, held to float64: every dtype, option and kind of base, and the ops counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Calls, copies, counted
from peft import LoraConfig, PeftModel, get_peft_model
from tolerance import FACTOR, assert_all_close, assert_close, relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.peft import FusedLinear, path_of

M, K, N, R = 260, 64, 96, 8
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Holder(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.proj(x, **kwargs)


def wrap(base: nn.Module, autocast_adapter_dtype: bool = True, **options: Any) -> PeftModel:
    """PEFT's model around one layer, with a random adapter of rank R."""
    options = {"r": R, "lora_alpha": 12, "init_lora_weights": False, **options}
    config = LoraConfig(target_modules=["proj"], fan_in_fan_out=isinstance(base, Conv1D), **options)
    return get_peft_model(Holder(base), config, autocast_adapter_dtype=autocast_adapter_dtype)


def outcome(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx and the gradient of everything that trains."""
    x = x.detach().requires_grad_()
    y = model(x)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *params.values()], dy.to(y.dtype))
    return dict(zip(("y", "dx", *params), (y, *grads), strict=True))


def noise(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Normal numbers that bf16 and fp16 hold exactly, in dtype."""
    return torch.randn(shape).to(BF16).to(dtype)


def assert_layer(model: PeftModel, x: Tensor, calls: Calls | tuple[int, int] = (1, 0), autocast: bool = False) -> None:
    """The patched copy is as near to float64 as PEFT, in y and in all gradients, by `calls` of our ops."""
    dy = noise(*x.shape[:-1], N)
    ours, exact = copies(model)
    with torch.autocast("cpu", BF16, enabled=autocast), counted() as count:
        actual = outcome(ours, x, dy)
        assert count == calls
        plain = outcome(model, x, dy)
        assert count == calls, "an unpatched model ran our ops"
    truth = outcome(exact, x.double(), dy)
    assert actual.keys() == plain.keys() == truth.keys()
    for name, value in actual.items():
        assert value.dtype == plain[name].dtype, name
        assert_close(value, plain[name], truth[name], name)


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear without bias": lambda: nn.Linear(K, N, bias=False),
    "Conv1D": lambda: Conv1D(N, K),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_bases_and_dtypes(base: str, dtype: torch.dtype) -> None:
    """A 16-bit base has fp32 adapters: PEFT's default."""
    model = wrap(BASES[base]().to(dtype))
    assert model.base_model.model.proj.lora_A["default"].weight.dtype == FP32
    assert_layer(model, noise(4, M // 4, K, dtype=dtype))


def test_adapters_in_the_base_dtype() -> None:
    assert_layer(wrap(nn.Linear(K, N).to(BF16), autocast_adapter_dtype=False), noise(M, K, dtype=BF16))


def test_float64() -> None:
    """Here PEFT is the oracle itself: a few roundings apart, whatever the order of the sums."""
    model, x, dy = wrap(nn.Linear(K, N).double()), noise(33, K, dtype=FP64), noise(33, N)
    ours, _ = copies(model)
    actual, plain = outcome(ours, x, dy), outcome(model, x, dy)
    for name, value in actual.items():
        assert relative_error(value, plain[name]) <= 4 * torch.finfo(FP64).eps, name


@pytest.mark.parametrize("base_dtype", [FP32, BF16], ids=str)
def test_autocast(base_dtype: torch.dtype) -> None:
    """Under autocast x, weight and PEFT's result are bf16, whatever came in."""
    assert_layer(wrap(nn.Linear(K, N).to(base_dtype)), noise(M, K), autocast=True)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"proj": 5}, "alpha_pattern": {"proj": 3}},
        {"lora_bias": True},
        {"r": 1},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": True},
    ],
    ids=str,
)
def test_lora_options(options: dict[str, Any]) -> None:
    """What only changes weights or scaling is fused as it is."""
    assert_layer(wrap(nn.Linear(K, N), **options), noise(M, K))


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, 5, K), (0, K)], ids=str)
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    """The errors of a few rows are few numbers, so several draws are judged together."""
    results = []
    for _ in range(12):
        model, x, dy = wrap(nn.Linear(K, N)), noise(*shape), noise(*shape[:-1], N)
        ours, exact = copies(model)
        results.append((outcome(ours, x, dy), outcome(model, x, dy), outcome(exact, x.double(), dy)))
    assert_all_close(results)


def test_strided_x() -> None:
    assert_layer(wrap(nn.Linear(K, N)), noise(K, M).t())
    assert_layer(wrap(nn.Linear(K, N)), noise(1, K).expand(M, K))


def several(base: nn.Module, **second: Any) -> PeftModel:
    """Two active adapters, of ranks R and 6."""
    model = wrap(base)
    options = {"r": 6, "lora_alpha": 5, "init_lora_weights": False, **second}
    model.add_adapter("other", LoraConfig(target_modules=["proj"], fan_in_fan_out=isinstance(base, Conv1D), **options))
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_several_active_adapters(base: str, dtype: torch.dtype) -> None:
    """They sum onto base_layer's output, in fp32, and are rounded once, at the end."""
    assert_layer(several(BASES[base]().to(dtype)), noise(M, K, dtype=dtype), calls=(0, 2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_several_active_adapters_save_no_wider_x(p: float, autocast: bool) -> None:
    """fp32 adapters on a bf16 base: beyond x, each saves its h and a seed, though their dx add up in fp32."""
    model = several(nn.Linear(K, N).to(BF16), lora_dropout=p)
    model.base_model.model.proj.lora_dropout["default"] = nn.Dropout(p)
    fastlora.patch(model)
    x = noise(M, K, dtype=BF16).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    beyond: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            beyond[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", BF16, enabled=autocast):
        y = model(x)
    assert y.requires_grad
    assert 0 < sum(beyond.values()) <= 4 * M * (R + 6) + (2 * 8 if p else 0)


def test_many_active_adapters_are_rounded_once() -> None:
    """A rounding after each of five would make 1.7 times PEFT's error in y, which hides below one whole rounding."""
    model, names = several(nn.Linear(K, N).to(BF16)), ["default", "other", "third", "fourth", "fifth"]
    for name in names[2:]:
        model.add_adapter(name, LoraConfig(target_modules=["proj"], r=R, lora_alpha=12, init_lora_weights=False))
    model.base_model.set_adapter(names)
    x, dy = noise(M, K, dtype=BF16), noise(M, N)
    assert_layer(model, x, calls=(0, 5))
    ours, exact = copies(model)
    y, plain, truth = outcome(ours, x, dy)["y"], outcome(model, x, dy)["y"], outcome(exact, x.double(), dy)["y"]
    assert relative_error(y, truth) <= FACTOR * relative_error(plain, truth)


def test_adapters_of_different_dtypes() -> None:
    model = several(nn.Linear(K, N))
    model.base_model.model.proj.lora_A["other"].to(BF16)
    model.base_model.model.proj.lora_B["other"].to(BF16)
    assert_layer(model, noise(M, K), calls=(0, 2))


def test_a_trained_base_gets_its_gradient() -> None:
    model = wrap(nn.Linear(K, N))
    model.base_model.model.proj.base_layer.requires_grad_(True)
    assert_layer(model, noise(M, K))


def test_a_frozen_lora_A() -> None:
    model = wrap(nn.Linear(K, N))
    model.base_model.model.proj.lora_A.requires_grad_(False)
    assert_layer(model, noise(M, K))


def test_a_frozen_adapter_beside_a_trained_one() -> None:
    model = several(nn.Linear(K, N))
    for part in ("lora_A", "lora_B"):
        getattr(model.base_model.model.proj, part)["default"].requires_grad_(False)
    assert_layer(model, noise(M, K), calls=(0, 2))


def test_scaling_in_a_tensor() -> None:
    """After prepare_model_for_compiled_hotswap the scaling is a 0-d tensor."""
    model = wrap(nn.Linear(K, N))
    layer = model.base_model.model.proj
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert_layer(model, noise(M, K))


def test_set_and_reset_the_scale() -> None:
    model = wrap(nn.Linear(K, N))
    layer = model.base_model.model.proj
    for change in (
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.unscale_layer(0.25),
        lambda: layer.unscale_layer(),
    ):
        change()
        assert_layer(model, noise(M, K))


def test_the_scale_of_a_patched_layer() -> None:
    model = wrap(nn.Linear(K, N))
    fastlora.patch(model)
    layer, x = model.base_model.model.proj, noise(5, K)
    with torch.no_grad():
        before = layer(x) - layer.base_layer(x)
        layer.scale_layer(2.0)
        after = layer(x) - layer.base_layer(x)
    assert float((after / before).median()) == pytest.approx(2, rel=1e-3)


def test_weight_bias_and_kind_are_still_there() -> None:
    from peft.tuners import lora

    model = wrap(nn.Linear(K, N))
    fastlora.patch(model)
    layer = model.base_model.model.proj
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert type(layer) is FusedLinear and isinstance(layer, lora.Linear) and "Linear" in type(layer).__name__
    assert repr(layer).startswith("lora.FusedLinear(")


def test_paths() -> None:
    model = several(nn.Linear(K, N))
    fastlora.patch(model)
    layer = model.base_model.model.proj
    assert path_of(layer) == ("split", "2 active adapters")
    model.set_adapter("other")
    assert path_of(layer)[0] == "fused"
    with model.disable_adapter():
        assert path_of(layer) == ("base", "adapters are disabled")


def test_explain_names_the_path() -> None:
    model = several(nn.Linear(K, N))
    fastlora.patch(model)
    layer, x = model.base_model.model.proj, noise(5, K)
    assert "split over 2 active adapters" in fastlora.explain(layer, x).why
    model.set_adapter("default")
    assert fastlora.explain(layer, x).path == "torch"
    assert fastlora.explain(layer, x.double()).path == "peft"
    model.merge_adapter()
    decision = fastlora.explain(layer, x)
    assert decision.path == "peft" and decision.why.startswith("merged")


@pytest.mark.parametrize("adapters", [1, 2])
def test_inductor(adapters: int) -> None:
    """torch.compile with its default backend, forward and backward, is as near to float64 as PEFT is."""
    torch.compiler.reset()
    model = several(nn.Linear(K, N)) if adapters == 2 else wrap(nn.Linear(K, N))
    x, dy = noise(M, K), noise(M, N)
    ours, exact = copies(model)
    plain, truth = outcome(model, x, dy), outcome(exact, x.double(), dy)
    actual = outcome(torch.compile(ours, fullgraph=True), x, dy)
    for name, value in actual.items():
        name = name.removeprefix("_orig_mod.")
        assert_close(value, plain[name], truth[name], name)


def dropout_result(model: PeftModel, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(x)


@pytest.mark.parametrize("adapters", [1, 2])
def test_dropout_drops_the_update_alone(adapters: int) -> None:
    """Over many masks the mean of y is its value without dropout, and one mask differs from the next."""
    model = several(nn.Linear(K, N), lora_dropout=0.5) if adapters == 2 else wrap(nn.Linear(K, N), lora_dropout=0.5)
    fastlora.patch(model)
    x = noise(3, K)
    with torch.no_grad():
        still = model.eval()(x)
        model.train()
        draws = torch.stack([dropout_result(model, x, seed) for seed in range(400)])
    assert torch.equal(draws[7], dropout_result(model, x, 7)) and not torch.equal(draws[7], draws[8])
    error = (draws.mean(0) - still) / (draws.std(0) / 20)
    assert float(error.abs().max()) < 5.5, "the mean over masks is off by more standard errors than chance allows"
    assert torch.equal(model.eval()(x), still)


def test_extreme_dropout_rates_and_their_training_flag() -> None:
    """The dropout module's own p and training flag count, not the layer's."""
    model = wrap(nn.Linear(K, N), lora_dropout=0.5)
    fastlora.patch(model)
    layer, x = model.base_model.model.proj, noise(3, K)
    layer.train()
    layer.lora_dropout["default"].eval()
    assert torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].train().p = 0.0
    assert torch.equal(layer(x), layer(x))
