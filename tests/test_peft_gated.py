"""Gated MLPs of patched models: found by what they compute, told from what only looks alike, patched by class alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from gating import MLP, Mine, family, gated_calls, mine
from models import VOCABULARY, peft_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

import fastlora
from fastlora.peft.structure import find

pytestmark = pytest.mark.usefixtures("however_few")


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


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return F.silu(g)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Tensor:
        return dz


def clipped_gradient(g: Tensor) -> Tensor:
    y = F.silu(g)
    if y.requires_grad:
        y.register_hook(lambda dz: dz.clamp(-1, 1))
    return y


class Part(nn.Module):
    """An activation that the trace does not look into."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, g: Tensor) -> Tensor:
        return self.function(g)


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
    (Part(F.silu), "silu"),
    (Part(StraightThrough.apply), None),
    (Part(torch.no_grad()(F.silu)), None),
    (Part(clipped_gradient), None),
    (Part(lambda g: F.silu(g) if g.requires_grad else F.relu(g)), None),
    (lambda g: F.silu(g).detach(), None),
    (lambda g: F.silu(g.detach()), None),
    (lambda g: g * torch.sigmoid(g.detach()), None),
    (lambda g: g + (F.relu(g) - g).detach(), None),
    (lambda g: F.silu(g).clamp(max=2.0), None),
    (lambda g: F.silu(g).clamp(max=65504.0), None),
    (lambda g: F.relu(g).clamp(max=1e38), None),
    (lambda g: F.relu(g).clamp(max=3.3895e38), None),
    (lambda g: torch.where((g > 5) & (g < 6), 0, F.silu(g)), None),
    (lambda g: torch.where((g < -1.5) & (g > -2), 0, F.silu(g)), None),
    (lambda g: torch.where(g.isinf(), F.relu(g), F.relu(g).clamp(max=1e30)), None),
    (lambda g: F.silu(g).nan_to_num(), None),
]


@pytest.mark.parametrize("act, name", ACTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_activations_are_told_apart(act: Any, name: str | None) -> None:
    """By their values from the smallest to past the largest, and by the gradients that come back through them."""
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


def counting(count: Callable[[Any], Any]) -> Any:
    """Gated, and a side effect; the module has three counters to choose from."""

    def forward(self: Any, x: Tensor) -> Tensor:
        count(self)
        return self.three(F.silu(self.one(x)) * self.two(x))

    return forward


OTHERS: dict[str, tuple[Any, str | None]] = {
    "residual": (lambda self, x: x + self.three(F.silu(self.one(x)) * self.two(x)), "not a child's output"),
    "scaled": (lambda self, x: self.three(2 * F.silu(self.one(x)) * self.two(x)), "is none of"),
    "scaled product": (lambda self, x: self.three(F.silu(self.one(x)) * self.two(x) * 2), "is not act(gate(x))"),
    "no gradient of up": (
        lambda self, x: self.three(F.silu(self.one(x)) * self.two(x).detach()),
        "is not act(gate(x))",
    ),
    "no gradient of x": (lambda self, x: self.three(F.silu(self.one(x)) * self.two(x.detach())), "is not act(gate(x))"),
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
    "counts": (counting(lambda self: setattr(self, "cnt", self.cnt.add_(1))), "a tensor of its own"),
    "counts in place": (counting(lambda self: self.cnt.add_(1)), "a tensor of its own"),
    "counts in a part": (counting(lambda self: self.several[0].add_(1)), "a tensor of its own"),
    "counts for itself": (counting(lambda self: self.box.append(1)), "keeps something"),
    "counts in a box's box": (counting(lambda self: self.boxes["a"].append(1)), "keeps something"),
    "looks at a buffer": (counting(lambda self: bool(self.cnt > 0)), "a tensor of its own"),
    "no product": (lambda self, x: self.three(F.silu(self.one(x)) + self.two(x)), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_left(name: str) -> None:
    body, reason = OTHERS[name]
    module = forward_of(body)()
    module.register_buffer("cnt", torch.tensor(7))
    module.several, module.box, module.boxes = torch.ones(2), [1], {"a": [1]}
    before, states = copy.deepcopy(dict(vars(module), _modules=None)), torch.get_rng_state()
    structure = find(module)
    now = dict(vars(module), _modules=None)
    assert now.pop("several").eq(before.pop("several")).all() and module.cnt == 7 and module.cnt._version == 0
    assert str(now) == str(before) and torch.equal(torch.get_rng_state(), states)
    assert structure is None if reason is None else isinstance(structure, str) and reason in structure


def test_an_activation_that_counts_is_left_and_not_run() -> None:
    class Counting(nn.SiLU):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = torch.zeros(()), []

        def forward(self, g: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(g)

    module = Mine(Counting())
    assert find(module) == "it keeps something of what it computes"
    assert module.act.calls == 0


def test_to_look_at_a_child_changes_nothing() -> None:
    """Not even where the module is left alone, and only told if it looks like an MLP."""

    class Counting(nn.Dropout):
        calls = 0

        def forward(self, g: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(g)

    model = mine(Counting(0.5)).train()
    state = torch.get_rng_state()
    assert fastlora.patch(model, inputs={"x": torch.ones(1, 12)}).ungated
    assert model.base_model.model.mlp.act.calls == 0 and torch.equal(torch.get_rng_state(), state)


def test_a_model_patched_under_inference_mode() -> None:
    model = mine()
    with torch.inference_mode():
        assert fastlora.patch(model).gated


def test_a_module_that_counts_goes_on_counting() -> None:
    """Patched, it is told with the reason, though no child of it is an activation, and runs its own forward."""
    model = mine(F.silu)
    mlp = model.base_model.model.mlp
    mlp.register_buffer("cnt", torch.zeros(()))
    kind = type("Counts", (Mine,), {"forward": lambda self, x: (self.cnt.add_(1), Mine.forward(self, x))[1]})
    mlp.__class__ = kind
    report = fastlora.patch(model)
    assert not report.gated and "a tensor of its own" in report.ungated["base_model.model.mlp"]
    assert mlp.cnt == 0 and mlp.cnt._version == 0
    for _ in range(3):
        model(torch.randn(2, 3, 12).double())
    assert mlp.cnt == 3


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_found_under_another_default_dtype(dtype: torch.dtype) -> None:
    expected = find(Mine())
    torch.set_default_dtype(dtype)
    try:
        assert find(Mine()) == expected and not isinstance(expected, str)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_child_with_sizes_of_other_names_is_no_layer_of_an_mlp() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.both = nn.Linear(12, 12), nn.Linear(12, 12), nn.Bilinear(12, 12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.both(self.first(x) * x, self.second(x))
            return y

    model = get_peft_model(Model(), LoraConfig(target_modules=["first", "second"]))
    report = fastlora.patch(model)
    assert len(report.patched) == 2 and not report.gated and not report.ungated


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_merging_for_good_leaves_nothing_of_ours(through: Callable[[Any], Any]) -> None:
    """Nor in a copy of the patched model: neither a class of ours, nor a hook, nor an attribute."""
    model = peft_model()
    names = {name: (type(m), set(vars(m))) for name, m in copy.deepcopy(model).merge_and_unload().named_modules()}
    fastlora.patch(model)
    merged = through(model).merge_and_unload()
    assert names == {name: (type(m), set(vars(m))) for name, m in merged.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in merged.modules())
