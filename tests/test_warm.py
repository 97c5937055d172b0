"""warmup: what it compiles is what a model then launches, and nothing else of the model changes."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from launches import compiled
from models import base_model, batch, logits, lora_config, step
from peft import PeftModel, get_peft_model
from tolerance import assert_same
from torch import nn

import fastlora
from fastlora import LoRALinear, dispatch

ROWS = 21  # of `batch`


def patched(dtype: torch.dtype = torch.float32, p: float = 0.0, layers: int = 1, **options: Any) -> PeftModel:
    """A tiny Llama with fp32 adapters on every linear layer."""
    model = get_peft_model(base_model(layers=layers).to(dtype), lora_config(lora_dropout=p, **options))
    fastlora.patch(model)
    return model


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[object, ...]]:
    """Every kernel that is launched, in a run on the kernels alone."""
    monkeypatch.setattr(dispatch.env, "backend", "triton")
    return compiled(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "p", "was_training"),
    [(torch.float32, 0.0, True), (torch.float32, 0.25, False), (torch.bfloat16, 0.25, True)],
)
def test_a_step_and_an_evaluation_compile_nothing_after_warmup(
    dtype: torch.dtype, p: float, was_training: bool, launched: set[tuple[object, ...]]
) -> None:
    """Two layers: the first one's q, k, v read a tensor that needs no gradient, the second one's a tensor that does."""
    model, inputs = patched(dtype, p, layers=2), batch()
    model.train(was_training)
    fastlora.warmup(model, rows=(ROWS,))
    warm = set(launched)
    launched.clear()
    step(model.train(), inputs)
    logits(model.eval(), inputs)
    assert launched and not launched - warm


def test_inference_mode_where_groups_run_one_by_one_is_prepared_too(launched: set[tuple[object, ...]]) -> None:
    model = patched(target_modules=["q_proj", "v_proj"])
    fastlora.warmup(model, rows=(ROWS,))
    warm = set(launched)
    launched.clear()
    with torch.inference_mode():
        model.eval()(**batch())
    assert launched and not launched - warm


def test_under_autocast_it_compiles_what_autocast_needs(launched: set[tuple[object, ...]]) -> None:
    model, inputs = patched(p=0.25), batch()
    with torch.autocast("cpu", torch.bfloat16):
        fastlora.warmup(model, rows=(ROWS,))
        warm = set(launched)
        launched.clear()
        step(model.train(), inputs)
    assert launched and not launched - warm


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_without_peft_are_compiled_too(frozen: bool, launched: set[tuple[object, ...]]) -> None:
    """Trained, or frozen on the way to what is trained; a merged layer stands for no other."""
    model = nn.Sequential(*(LoRALinear(32, 32, r=4, lora_dropout=0.25) for _ in range(3)))
    model.requires_grad_(not frozen)
    model[0].merge()
    fastlora.warmup(model, rows=(ROWS,))
    warm = set(launched)
    launched.clear()
    model(torch.randn(ROWS, 32, requires_grad=True)).backward(torch.randn(ROWS, 32))
    with torch.no_grad():
        model.eval()(torch.randn(ROWS, 32))
    assert launched and not launched - warm


def test_what_only_serves_is_compiled_forward_alone(launched: set[tuple[object, ...]]) -> None:
    fastlora.warmup(LoRALinear(32, 32, r=4, lora_dropout=0.25).requires_grad_(False).eval(), rows=(ROWS,))
    assert {name for name, *_ in launched} == {"_shrink_kernel", "_expand_kernel"}


def test_each_distinct_layer_group_and_mlp_runs_once_a_row_count() -> None:
    model = nn.Sequential(LoRALinear(24, 40), LoRALinear(40, 24, r=2, lora_dropout=0.1), LoRALinear(24, 40))
    assert list(fastlora.warmup(model, rows=iter((1, 5)))) == [f"{i} at {M} rows" for i in (0, 1) for M in (1, 5)]
    inside = "base_model.model.model.layers.0."
    assert list(fastlora.warmup(patched(layers=2), rows=(ROWS,))) == [
        f"{inside}{what} at {ROWS} rows" for what in ("self_attn.q_proj, k_proj, v_proj", "self_attn.o_proj", "mlp")
    ]


def test_nothing_of_the_model_changes(launched: set[tuple[object, ...]]) -> None:
    """Values, gradients, modes, hooks, random states; and a user's hooks are not called."""
    model = patched(torch.bfloat16, 0.25).train()
    layers = model.base_model.model.model.layers[0]
    layers.self_attn.o_proj.eval()
    layers.mlp.up_proj.lora_dropout.eval()
    called: list[nn.Module] = []
    for module in (layers.self_attn.o_proj, layers.self_attn.v_proj, layers.mlp):
        module.register_forward_hook(lambda module, x, y: called.append(module))
    step(model, batch())
    called.clear()

    def state() -> list[Any]:
        attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()]
        return [[type(m) for m in model.modules()], attributes, hooks, random.getstate()]

    tensors = [t.clone() for p in model.parameters() for t in (p, p.grad) if t is not None]
    before, generator = state(), torch.get_rng_state()
    fastlora.warmup(model, rows=(ROWS, 3))
    assert state() == before and not called
    assert_same(torch.get_rng_state(), generator)
    after = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    for now, then in zip(after, tensors, strict=True):
        assert_same(now, then)


def test_modes_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LoRALinear(24, 40).eval()
    monkeypatch.setattr(layer, "forward", lambda x: x.no_such_thing)
    with pytest.raises(AttributeError):
        fastlora.warmup(layer, rows=(1,))
    assert not any(module.training for module in layer.modules())


def test_progress_on_a_terminal_and_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(LoRALinear(24, 40))
    with caplog.at_level(logging.INFO, "fastlora"):
        fastlora.warmup(model, rows=(1, 5))
    assert [record.getMessage() for record in caplog.records] == ["warmup 1/2: 0 at 1 rows", "warmup 2/2: 0 at 5 rows"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fastlora.warmup(model, rows=(1, 5))
    shown = capsys.readouterr().err
    assert "\rfastlora warmup 1/2: 0 at 1 rows" in shown and "\rfastlora warmup 2/2: 0 at 5 rows" in shown
    assert shown.count("\n") == 1 and shown.endswith("\n")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (5, TypeError, "rows: got 5, wanted whole numbers ≥ 1"),
        ("12", TypeError, "rows: got '12', wanted whole numbers ≥ 1"),
        (("a",), TypeError, "rows: got 'a' among ['a'], wanted whole numbers ≥ 1"),
        ((2.0,), TypeError, "rows: got 2.0 among [2.0], wanted whole numbers ≥ 1"),
        ((True,), TypeError, "rows: got True among [True], wanted whole numbers ≥ 1"),
        ((3, -1), ValueError, "rows: got -1 among [3, -1], wanted whole numbers ≥ 1"),
        ((0,), ValueError, "rows: got 0 among [0], wanted whole numbers ≥ 1"),
    ],
)
def test_rows_that_are_no_row_counts(rows: Iterable[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fastlora.warmup(LoRALinear(24, 40), rows=rows)


def test_models_that_cannot_be_warmed_up() -> None:
    with pytest.raises(TypeError, match=r"model: got NoneType, wanted a torch\.nn\.Module"):
        fastlora.warmup(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: holds no fastlora layer"):
        fastlora.warmup(nn.Linear(2, 2))
    layer = LoRALinear(24, 40, device="meta")
    with pytest.raises(ValueError, match="model: got LoRALinear on the meta device, wanted parameters that have"):
        fastlora.warmup(layer)
    with pytest.raises(ValueError, match=r"model: got .*q_proj, k_proj, v_proj on the meta device"):
        fastlora.warmup(patched().to("meta"))
