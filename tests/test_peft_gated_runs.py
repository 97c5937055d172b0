"""Gated MLPs of patched models at work: as one op, layer by layer where one would miss, in copies and in training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from gating import MLP, family, gated_calls, mine
from grouping import group_calls, nothing_left
from models import assert_parity, batch, lora_config, lora_layers, peft_model, step, through_torch_save
from peft import LoraConfig
from torch import Tensor, nn

import fastlora
from fastlora import dispatch, ops

pytestmark = pytest.mark.usefixtures("however_few")


@pytest.mark.parametrize("targets", [["one"], ["two", "three"], ["three"]])
def test_plain_layers_beside_adapted_ones(targets: list[str]) -> None:
    model, x = mine(target_modules=targets), torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)
    assert fastlora.patch(model).gated
    with gated_calls() as calls:
        assert torch.allclose(model(x), expected, rtol=1e-12)
        assert torch.allclose(model.base_model.model.mlp(hidden=x), expected, rtol=1e-12)
        assert calls.call_count == 2
        model.base_model.model.mlp(x, 3)
        assert calls.call_count == 2, "further arguments are its own forward's"


def test_only_biases_are_trained() -> None:
    """Neither dx nor a low-rank gradient is wanted of gate and up, which have no adapter."""
    model = mine(target_modules=["three"], bias="all")
    ours, x = copy.deepcopy(model), torch.randn(3, 12, dtype=torch.float64)
    assert fastlora.patch(ours).gated
    for each in (model, ours):
        each(x).square().sum().backward()
    for theirs, own in zip(model.parameters(), ours.parameters(), strict=True):
        assert (theirs.grad is None) == (own.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(own.grad, theirs.grad)


def layer(mlp: Any, name: str = "one") -> Any:
    return getattr(mlp, name)


def hook(get: Callable[[Any], nn.Module]) -> Callable[[Any], Callable[[], Any]]:
    return lambda mlp: get(mlp).register_forward_hook(lambda module, args, y: 2 * y).remove


def replace_act(mlp: Any) -> Callable[[], Any]:
    old, mlp.act = mlp.act, nn.Tanh()
    return lambda: setattr(mlp, "act", old)


def change_act(mlp: Any) -> Callable[[], Any]:
    mlp.act.forward = torch.tanh
    return lambda: delattr(mlp.act, "forward")


def replace_layer(mlp: Any) -> Callable[[], Any]:
    old, mlp.three = mlp.three, nn.Bilinear(20, 20, 12).double()
    mlp.three.forward = lambda z: z[..., :12]
    return lambda: setattr(mlp, "three", old)


def merge(mlp: Any) -> Callable[[], Any]:
    mlp.two.merge()
    return mlp.two.unmerge


def disable(mlp: Any) -> Callable[[], Any]:
    mlp.two.enable_adapters(False)
    return lambda: mlp.two.enable_adapters(True)


def opt_out(mlp: Any) -> Callable[[], Any]:
    mlp.fastlora_gated = False
    return lambda: setattr(mlp, "fastlora_gated", True)


def shard(mlp: Any) -> Callable[[], Any]:
    mlp.two.base_layer._hf_tp_plan = "colwise"
    return lambda: delattr(mlp.two.base_layer, "_hf_tp_plan")


def second_adapter(mlp: Any) -> Callable[[], Any]:
    for each in (mlp.one, mlp.two, mlp.three):
        if "other" not in each.lora_A:
            each.update_layer("other", 3, lora_alpha=2, config=LoraConfig(r=3, init_lora_weights=False))
            each.double()
        each.set_adapter(["default", "other"])
    return lambda: [each.set_adapter("default") for each in (mlp.one, mlp.two, mlp.three)]


STATES: dict[Callable[[Any], Callable[[], Any]], str] = {
    hook(lambda mlp: mlp.one): "one has hooks",
    hook(lambda mlp: mlp.three): "three has hooks",
    hook(lambda mlp: mlp.act): "act has hooks",
    hook(lambda mlp: mlp.two.base_layer): "two: base_layer has hooks",
    hook(lambda mlp: mlp.one.lora_A["default"]): "one: adapter 'default' has hooks",
    replace_act: "act.__class__ was changed",
    change_act: "act has hooks, or a forward of its own",
    replace_layer: "three has hooks, or a forward of its own",
    merge: "two: merged",
    disable: "two: its adapters are disabled",
    opt_out: "fastlora_gated is False",
    shard: "tensor-parallel",
    second_adapter: "one: 2 active adapters",
}


@pytest.mark.parametrize("enter", STATES, ids=STATES.values())
def test_a_state_that_one_op_would_miss(enter: Callable[[Any], Callable[[], Any]]) -> None:
    """While it lasts the layers run one by one, with the unpatched model's results; explain says why; then one op."""
    ours, x = mine(), torch.randn(3, 12, dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    fastlora.patch(ours)
    mlp = ours.base_model.model.mlp
    torch.manual_seed(1)
    leave = enter(mlp)
    torch.manual_seed(1)
    leave_theirs = enter(theirs.base_model.model.mlp)
    decision = fastlora.explain(mlp, x)
    assert decision.path == "layers" and STATES[enter] in decision.why
    with gated_calls() as calls:
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10)
        assert calls.call_count == 0
        leave()
        leave_theirs()
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10)
        assert calls.call_count == 1
    assert "one gated MLP (silu) of one, two, three" in fastlora.explain(mlp, x).why


def test_a_hook_of_the_mlp_itself_runs() -> None:
    model, x = mine(), torch.randn(3, 12, dtype=torch.float64)
    fastlora.patch(model)
    model.base_model.model.mlp.register_forward_hook(lambda module, args, y: 0 * y)
    with gated_calls() as calls:
        assert not model(x).any() and calls.call_count == 1


def test_dropout_is_off_in_evaluation_alone() -> None:
    model, x = mine(lora_dropout=0.5), torch.randn(3, 12, dtype=torch.float64)
    expected = model.eval()(x)
    fastlora.patch(model)
    with gated_calls() as calls:
        assert torch.allclose(model(x), expected, rtol=1e-12)
        assert not torch.allclose(model.train()(x), expected, rtol=1e-3)
        model.base_model.model.mlp.one.eval()
        model(x)
        assert calls.call_count == 3
    found = [[layer.dropout_p for layer in call.args[1:4]] for call in calls.call_args_list]
    assert found == [[0.0] * 3, [0.5] * 3, [0.0, 0.5, 0.5]]


def test_a_plain_layer_of_another_dtype_is_refused_as_unpatched() -> None:
    """Autocast alone brings x and a weight together, and then in one op."""
    model, x = mine(target_modules=["one", "two"]).float(), torch.randn(3, 12)
    mlp = model.base_model.model.mlp
    mlp.three.bfloat16()
    fastlora.patch(model)
    assert "three: x is torch.float32 and its weight torch.bfloat16" in fastlora.explain(mlp, x).why
    with gated_calls() as calls:
        with pytest.raises(RuntimeError, match="same dtype"):
            model(x)
        assert calls.call_count == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert calls.call_count == 1


def test_a_mixed_batch_is_pefts() -> None:
    model, inputs = peft_model().eval(), batch()
    model.add_adapter("other", lora_config())
    fastlora.patch(model)
    with gated_calls() as calls, torch.no_grad():
        model(**inputs, adapter_names=["default", "other", "__base__"])
        assert calls.call_count == 0
        with model.disable_adapter():
            model(**inputs)
        assert calls.call_count == 0
        model(**inputs)
        assert calls.call_count == 2


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model(), batch()
    report = fastlora.patch(model, gated=False)
    assert not report.gated and set(report.ungated.values()) == {"patch(gated=False)"}
    with gated_calls() as calls, torch.no_grad():
        model(**inputs)
        model.get_submodule(MLP).fastlora_gated = False
        assert len(fastlora.patch(model).gated) == 1
        model(**inputs)
        assert calls.call_count == 1
        monkeypatch.setattr(dispatch.env, "disable", True)
        model(**inputs)
        assert calls.call_count == 1


def test_siblings_in_an_mlp_that_runs_layer_by_layer() -> None:
    """gate and up are one group without a hook on the MLP, whose forward is ours; what an exception leaves is gone."""
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    mlp = model.get_submodule(MLP)
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks
    with group_calls() as calls, torch.no_grad():
        model(**inputs)
        fused = calls.call_count
        mlp.fastlora_gated = False
        model(**inputs)
        assert calls.call_count == 2 * fused + 1
    assert nothing_left()
    handle = mlp.gate_proj.register_forward_hook(raises)
    with pytest.raises(RuntimeError, match="on purpose"):
        mlp(torch.randn(2, 64))
    handle.remove()
    assert nothing_left()


def raises(module: nn.Module, args: Any, output: Any) -> None:
    raise RuntimeError("on purpose")


def test_few_rows_run_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    monkeypatch.setattr(ops, "FEW_INPUTS", 10**6)
    assert "few rows" in fastlora.explain(model.get_submodule(MLP), torch.randn(2, 64)).why
    with gated_calls() as calls:
        model(**inputs)
    assert calls.call_count == 0


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_copies_are_patched_too(through: Callable[[nn.Module], nn.Module]) -> None:
    """A copy runs its own weights, as one op, and is unpatched by itself."""
    model, inputs = family("Gemma"), batch()
    fastlora.patch(model)
    other = through(model)
    with torch.no_grad():
        for p in other.get_submodule(MLP).parameters():
            p.mul_(1.5)
        expected = copy.deepcopy(other)
        fastlora.unpatch(expected)
        with gated_calls() as calls:
            assert torch.allclose(other(**inputs).logits, expected(**inputs).logits, rtol=1e-4, atol=1e-5)
            assert calls.call_count == 2
            assert not torch.allclose(model(**inputs).logits, expected(**inputs).logits, rtol=1e-2)
    assert type(expected.get_submodule(MLP)) is transformers.models.gemma.modeling_gemma.GemmaMLP


def test_a_replica_runs_its_own_layers() -> None:
    """DataParallel's replicas share a module's attributes and hold other parameters."""
    model = mine()
    fastlora.patch(model)
    mlp = model.base_model.model.mlp
    replica = mlp._replicate_for_data_parallel()
    replica.three = nn.Linear(20, 12).double()
    with gated_calls() as calls:
        replica(torch.randn(3, 12, dtype=torch.float64))
    assert calls.call_args.args[3].weight is replica.three.weight


def trained(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    return step(model.train(), inputs, **kwargs)


def checkpointed(use_reentrant: bool) -> Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]:
    def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return trained(model, inputs)

    return run


def autocast(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if next(model.parameters()).dtype == torch.float64:  # the exact one
        return trained(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        return trained(model, inputs)


def compiled(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours compiled; PEFT's, and the exact, as they are: aot_eager computes as eager does, and each takes 8 s."""
    if not all(type(layer).__module__.startswith("fastlora") for layer in lora_layers(model).values()):
        return trained(model, inputs)
    torch._dynamo.reset()
    found = trained(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


RUNS = {
    "plain": trained,
    "checkpoint": checkpointed(False),
    "reentrant": checkpointed(True),
    "autocast": autocast,
    "compiled": compiled,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_pefts(name: str) -> None:
    with gated_calls() as calls:
        assert_parity(lambda: family("Gemma"), RUNS[name], draws=2)
    assert calls.call_count >= 4 or name == "compiled"


def test_bf16_with_default_adapters_is_pefts() -> None:
    """bf16 base, fp32 adapters: what PEFT makes by default."""

    def build() -> nn.Module:
        model = peft_model()
        for each in lora_layers(model).values():
            each.base_layer.bfloat16()
        model.base_model.model.model.embed_tokens.bfloat16()
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.bfloat16()
        model.base_model.model.lm_head.bfloat16()
        return model

    with gated_calls() as calls:
        assert_parity(build, trained, draws=2)
    assert calls.call_count == 4


def test_ten_steps_of_training() -> None:
    """Losses and trained adapters as near to float64's as PEFT's are, at p = 0."""

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        losses = {}
        for i in range(10):
            losses[f"loss {i}"] = model.train()(**inputs).loss
            optimizer.zero_grad()
            losses[f"loss {i}"].backward()
            optimizer.step()
        assert losses["loss 9"] < losses["loss 0"]
        return {**losses, **parameters}

    with gated_calls() as calls:
        assert_parity(lambda: peft_model(init_lora_weights=True), run, draws=2)
    assert calls.call_count == 2 * 2 * 10
