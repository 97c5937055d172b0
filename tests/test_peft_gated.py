"""Gated MLPs of patched models: found by what they compute, run as one op, and layer by layer where one would miss."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from grouping import gated_calls
from models import VOCABULARY, assert_parity, batch, lora_config, lora_layers, peft_model, step
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

import fastlora
from fastlora import dispatch, ops
from fastlora.peft.structure import find

MLP = "base_model.model.model.layers.0.mlp"


@pytest.fixture(autouse=True)
def _as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the rows, one op."""
    monkeypatch.setattr(ops, "FEW_INPUTS", 0)


def family(name: str, **options: Any) -> PeftModel:
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=VOCABULARY, use_cache=False)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = getattr(transformers, f"{name}Config")(**ids, **sizes, **heads, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return get_peft_model(model, lora_config(target_modules="all-linear"))


@pytest.mark.parametrize(
    "name, activation",
    [("Llama", "silu"), ("Qwen3", "silu"), ("Mistral", "silu"), ("Gemma", "gelu_tanh"), ("Gemma2", "gelu_tanh")],
)
def test_families(name: str, activation: str) -> None:
    """Each MLP is one op, and computes what its class's own forward computes, in float64, gradients too."""
    model = family(name).double()
    own = copy.deepcopy(model)
    report = fastlora.patch(model)
    told = f"one gated MLP ({activation}) of gate_proj, up_proj, down_proj"
    assert report.gated == {f"base_model.model.model.layers.{i}.mlp": told for i in range(2)} and not report.ungated
    assert f"layers.*.mlp               ×2    {told}" in str(report)
    x, found = torch.randn(2, 5, 64, dtype=torch.float64), []
    for each in (model, own):
        mlp, inner = each.get_submodule(MLP), x.clone().requires_grad_()
        with gated_calls() as calls:
            y = mlp(inner)
        assert calls.call_count == (each is model)
        y.square().sum().backward()
        found.append([y, inner.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)])
    assert len(found[0]) == 2 + 6
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_families_that_are_left_alone() -> None:
    phi = family("Phi3")
    report = fastlora.patch(phi)
    assert not report.gated
    reason = "its forward cannot be traced: it unpacks a value, as where gate and up are one layer"
    assert set(report.ungated.values()) == {reason}
    assert f"mlp                 ×2    MLP, layer by layer: {reason}" in str(report)
    ids = dict(pad_token_id=0, vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    config = transformers.T5Config(**ids, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    t5 = get_peft_model(transformers.T5ForConditionalGeneration(config), LoraConfig(target_modules=["wi_0", "wo"]))
    report = fastlora.patch(t5)
    assert len(report.ungated) == 2 and not report.gated
    assert all("dropout" in reason or "traced" in reason for reason in report.ungated.values())
    report = fastlora.patch(peft_model("gpt2"))
    assert not report.gated and not report.ungated, "nothing is gated there"


class Mine(nn.Module):
    """A user's own module; `act` is any function of gate's output."""

    def __init__(self, act: Any = F.silu) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)
        self.act = act

    def forward(self, hidden: Tensor, unused: Any = None) -> Tensor:
        opened = self.two(hidden)
        return self.three(opened.mul(self.act(self.one(hidden))))


ACTS: list[tuple[Any, str | None]] = [
    (F.silu, "silu"),
    (nn.SiLU(), "silu"),
    (lambda g: g * torch.sigmoid(g), "silu"),
    (activations.ACT2FN["swish"], "silu"),
    (nn.GELU(), "gelu"),
    (F.gelu, "gelu"),
    (activations.ACT2FN["gelu"], "gelu"),
    (activations.ACT2FN["gelu_python"], "gelu"),
    (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
    (activations.ACT2FN["gelu_new"], "gelu_tanh"),
    (activations.ACT2FN["gelu_fast"], "gelu_tanh"),
    (torch.relu, "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (activations.ACT2FN["relu2"], "relu2"),
    (lambda g: F.relu(g) ** 2, "relu2"),
    (activations.ACT2FN["quick_gelu"], None),
    (activations.ACT2FN["gelu_10"], None),
    (torch.tanh, None),
    (nn.ReLU6(), None),
    (nn.LeakyReLU(1e-4), None),
    (nn.PReLU(init=0.0), None),
    (nn.RReLU(0.0, 0.1), None),
    (nn.Softmax(-1), None),
    (nn.Identity(), None),
    (lambda g: F.dropout(F.silu(g), 0.1), None),
    (lambda g: 2 * F.silu(g), None),
    (lambda g: F.silu(g, inplace=False).float(), None),
]


@pytest.mark.parametrize("act, name", ACTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_activations_are_told_apart(act: Any, name: str | None) -> None:
    structure = find(Mine(act).train())
    if name is None:
        assert isinstance(structure, str) and "what follows one is none of silu, gelu" in structure
    else:
        assert structure is not None and not isinstance(structure, str)
        assert (structure.x, *structure.layers, structure.activation) == ("hidden", "one", "two", "three", name)


def forward_of(body: Callable[[Any, Tensor], Any]) -> type[Mine]:
    return type("Other", (Mine,), {"forward": body})


@torch.no_grad()
def without_gradients(self: Any, x: Tensor) -> Tensor:
    return self.three(F.silu(self.one(x)) * self.two(x))


def without_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=True):
        return self.three(F.silu(self.one(x)) * self.two(x))


def keeping(self: Any, x: Tensor) -> Tensor:
    self.last = self.one(x)
    return self.three(F.silu(self.last) * self.two(x))


OTHERS: dict[str, tuple[Any, str | None]] = {
    "residual": (lambda self, x: x + self.three(F.silu(self.one(x)) * self.two(x)), "not a child's output"),
    "scaled": (lambda self, x: self.three(2 * F.silu(self.one(x)) * self.two(x)), "is none of"),
    "scaled product": (lambda self, x: self.three(F.silu(self.one(x)) * self.two(x) * 2), "is not act(gate(x))"),
    "bilinear": (lambda self, x: self.three(self.one(x) * self.two(x)), "is not act(gate(x))"),
    "no up": (lambda self, x: self.three(F.silu(self.one(x)) * x), "is not act(gate(x))"),
    "one for both": (lambda self, x: self.three(F.silu(self.one(x)) * self.one(x)), "three children"),
    "other input": (lambda self, x: self.three(F.silu(self.one(x)) * self.two(x + 1)), "is not act(gate(x))"),
    "more": (lambda self, x: (self.three(F.silu(self.one(x)) * self.two(x)), self.two(x))[0], "does more than"),
    "two results": (lambda self, x: (self.three(F.silu(self.one(x)) * self.two(x)), x), "not a child's output"),
    "branch": (lambda self, x: self.three(F.silu(self.one(x)) * self.two(x)) if x.sum() > 0 else x, "cannot be traced"),
    "mode": (lambda self, x: self.three((F.silu if self.training else F.relu)(self.one(x)) * self.two(x)), "training"),
    "no_grad": (without_gradients, "changes grad mode or autocast"),
    "autocast": (without_autocast, "changes grad mode or autocast"),
    "keeps": (keeping, "keeps something"),
    "no product": (lambda self, x: self.three(F.silu(self.one(x)) + self.two(x)), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_left(name: str) -> None:
    body, reason = OTHERS[name]
    module = forward_of(body)()
    before, states = dict(vars(module)), torch.get_rng_state()
    structure = find(module)
    assert vars(module) == before and torch.equal(torch.get_rng_state(), states)
    assert structure is None if reason is None else isinstance(structure, str) and reason in structure


def mine(act: Any = None, **options: Any) -> PeftModel:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mine(act or nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)

    options = {"target_modules": ["one", "two", "three"], "r": 2, "init_lora_weights": False, **options}
    return get_peft_model(Holder(), LoraConfig(**options)).double()


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


def test_few_rows_run_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = peft_model(), batch()
    fastlora.patch(model)
    monkeypatch.setattr(ops, "FEW_INPUTS", 10**6)
    assert "few rows" in fastlora.explain(model.get_submodule(MLP), torch.randn(2, 64)).why
    with gated_calls() as calls:
        model(**inputs)
    assert calls.call_count == 0


def test_nothing_but_the_class_changes() -> None:
    model = peft_model()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    fastlora.patch(model)
    mlp = model.get_submodule(MLP)
    assert isinstance(mlp, transformers.models.llama.modeling_llama.LlamaMLP) and type(mlp).__name__ == "LlamaMLP"
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_parameters()] == parameters
    first = fastlora.patch(model)
    assert first == fastlora.patch(model)
    fastlora.unpatch(model)
    assert before == {name: (type(m), set(vars(m))) for name, m in model.named_modules()}


def test_merging_for_good_leaves_nothing_of_ours() -> None:
    model = peft_model()
    fastlora.patch(model)
    merged = model.merge_and_unload()
    mlp = merged.model.layers[0].mlp
    assert type(mlp) is transformers.models.llama.modeling_llama.LlamaMLP and "_structure" not in vars(mlp)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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
