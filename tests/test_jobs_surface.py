"""What surrounds jobs: the layer and its base, saving and loading, autocast, compilation, memory, bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crews import (
    CREW,
    MIXED,
    State,
    assert_equal,
    crewed,
    dropping,
    fresh,
    gradients,
    ids,
)
from models import base_model, lora_config
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tolerance import assert_same
from torch import Tensor, nn

import fastlora
from fastlora import Jobs


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, dict[str, State]]:
    torch.manual_seed(7)
    model = base_model("llama").train()
    return model, {name: state for name, (_, state) in fresh(model).items()}


@pytest.fixture
def jobs(llama: tuple[nn.Module, dict[str, State]]) -> tuple[nn.Module, Jobs]:
    model = copy.deepcopy(llama[0])
    return model, crewed(model, llama[1])


def test_outside_of_use_the_model_is_its_base(llama: Any, jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    batch = ids()
    assert_same(model(input_ids=batch).logits, llama[0](input_ids=batch).logits)
    with crew.use([None] * len(batch)):
        assert_same(model(input_ids=batch).logits, llama[0](input_ids=batch).logits)
    crew.close()
    assert [type(m) for m in model.modules()] == [type(m) for m in llama[0].modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_closed_jobs_say_so_and_leave_others_alone(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    crew.close()
    with pytest.raises(RuntimeError, match=r"use: got a call after close\(\)"), crew.use(MIXED):
        pass
    others = Jobs(model)
    crew.close()
    assert all(layer in [*model.modules()] for layer in others.layers.values())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_file_of_the_model_waits_for_close(jobs: tuple[nn.Module, Jobs], tmp_path: Path) -> None:
    """While jobs have its layers it would name weights as no model does."""
    model: Any
    model, crew = jobs
    for change in (lambda: model.save_pretrained(tmp_path), lambda: model.add_adapter(lora_config())):
        with pytest.raises(RuntimeError, match=r"\w+: got a call while jobs have the model's layers, wanted Jobs.save"):
            change()
    assert not list(tmp_path.iterdir())
    crew.close()
    model.save_pretrained(tmp_path)
    for name, t in type(model).from_pretrained(tmp_path).state_dict().items():
        assert_same(t, model.state_dict()[name])


def test_jobs_that_come_and_go_in_inference_mode_train(jobs: tuple[nn.Module, Jobs], tmp_path: Path) -> None:
    """A server may evaluate in it; the pool that they then share is everybody's."""
    model, crew = jobs
    crew.save("b", tmp_path)
    with torch.inference_mode():
        crew.remove("b")
        crew.load(tmp_path, "d")
        crew.add("e")
    for name in crew.names:
        gradients(model, crew, ids(), [name] * len(MIXED))
        torch.optim.AdamW(crew.parameters(name)).step()


def test_factors_lie_in_one_pool_and_steps_write_into_it(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    layer = crew.layers["model.layers.0.self_attn.q_proj"]
    assert len({job.lora_A.weight.untyped_storage().data_ptr() for job in layer.jobs.values()}) == 1
    assert all(p.is_contiguous() for job in layer.jobs.values() for p in job.parameters())
    before = crew.state_dict("c")
    gradients(model, crew, ids(), MIXED)
    for options in ({"foreach": True}, {"fused": True}):
        optimizer = torch.optim.AdamW(crew.parameters("c"), lr=0.1, **options)
        optimizer.step()
    assert len({job.lora_A.weight.untyped_storage().data_ptr() for job in layer.jobs.values()}) == 1
    assert not any(torch.equal(t, before[key]) for key, t in crew.state_dict("c").items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_saved_jobs_are_pefts_adapters(family: str, tmp_path: Path) -> None:
    """What a job saves, plain PEFT loads and computes alike; what plain PEFT saves, a job goes on from."""
    model = base_model(family)
    ((peft, start),) = fresh(model, family, {"c": CREW["c"]}).values()
    ours = copy.deepcopy(model)
    named = peft.peft_config["default"].target_modules
    crew = Jobs(ours, list(named))
    peft.save_pretrained(tmp_path / "theirs")
    crew.load(tmp_path / "theirs", "c")
    assert_equal({key: t for key, t in crew.state_dict("c").items()}, start)
    batch = {"input_ids": ids()} | ({"decoder_input_ids": ids()} if family == "t5" else {})
    with torch.no_grad():
        for p in crew.parameters("c"):
            p.add_(0.05 * torch.randn_like(p))
        crew.save("c", tmp_path / "ours")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        with crew.use(["c"] * len(MIXED)):
            found = ours.eval()(**batch).logits
        torch.testing.assert_close(found, loaded(**batch).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, peft.eval()(**batch).logits, rtol=1e-3, atol=1e-4)
    assert_equal(get_peft_model_state_dict(loaded), crew.state_dict("c"))
    set_peft_model_state_dict(peft, crew.state_dict("c"))


def test_autocast(jobs: tuple[nn.Module, Jobs]) -> None:
    """As `lora_linear` under autocast, row by row of each job; factors and their gradients stay fp32."""
    _, crew = jobs
    layer = crew.layers["model.layers.0.mlp.gate_proj"]
    x, names = torch.randn(3, 5, 64, requires_grad=True), ["c", "a", "c"]
    with layer.use_jobs(names), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    dx, x.grad = x.grad, None
    for name, rows in (("a", [1]), ("c", [0, 2])):
        job = layer.jobs[name]
        found = [p.grad for p in layer.job_parameters(name)]
        assert all(t is not None and t.dtype == torch.float32 for t in found)
        for p in layer.job_parameters(name):
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            alone = fastlora.functional.lora_linear(
                x[rows], layer.weight, layer.bias, job.lora_A.weight, job.lora_B.weight, job.scaling,
                lora_bias=job.lora_B.bias,
            )  # fmt: skip
        torch.testing.assert_close(y[rows], alone, rtol=0, atol=2**-5)
        alone.float().square().sum().backward()
        torch.testing.assert_close(dx[rows], x.grad[rows], rtol=0.02, atol=0.1)  # type: ignore[index]
        for one, p in zip(found, layer.job_parameters(name), strict=True):
            torch.testing.assert_close(one, p.grad, rtol=0.02, atol=0.02 * float(one.abs().max()))  # type: ignore


def test_compiled(llama: Any) -> None:
    """A mapping that stays: the whole graph, forward and backward, with dropout from the same seed."""
    _, crew = dropping(llama, "abc")
    layer = crew.layers["model.layers.0.mlp.gate_proj"]
    x, grads = torch.randn(7, 5, 64), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        torch.manual_seed(4)
        for name in crew.names:
            for p in layer.job_parameters(name):
                p.grad = None
        with layer.use_jobs(MIXED):
            run(x).square().sum().backward()
        grads.append([p.grad for name in crew.names for p in layer.job_parameters(name)])
    for one, other in zip(*grads, strict=True):
        assert_same(one, other)
    with layer.use_jobs(["b", None, "a", "a", "a", "c", "b"]), torch.no_grad():  # another mapping: another graph
        torch.manual_seed(4)
        wanted = layer(x)
        torch.manual_seed(4)
        assert_same(compiled(x), wanted)
    with torch.no_grad():
        assert_same(compiled(x), layer.base_layer(x))


def test_base_layers_of_any_kind(jobs: tuple[nn.Module, Jobs]) -> None:
    """One with a hook, and one that is no nn.Linear itself, are called; the jobs' terms land on what they return."""
    _, crew = jobs
    layer = crew.layers["model.layers.0.mlp.gate_proj"]
    x = torch.randn(7, 5, 64, requires_grad=True)
    with layer.use_jobs(MIXED):
        usual = layer(x)
        usual.sum().backward()
    wanted = [x.grad, *(p.grad for p in layer.job_parameters("a"))]
    x.grad = None
    for p in layer.job_parameters("a"):
        p.grad = None
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    with layer.use_jobs(MIXED):
        found = layer(x)
        found.sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(found, usual)
    for one, other in zip(wanted, [x.grad, *(p.grad for p in layer.job_parameters("a"))], strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_by_itself() -> None:
    """MultiLoRALinear without a model: jobs on one layer, trained by its own `use_jobs`."""
    linear = nn.Linear(12, 20)
    layer = fastlora.MultiLoRALinear(linear, 12, 20)
    for name in "ab":
        layer.add_job(name, r=2)
    assert [tuple(p.shape) for p in layer.job_parameters("a")] == [(2, 12), (20, 2)]
    assert not linear.weight.requires_grad
    x = torch.randn(4, 3, 12)
    with layer.use_jobs(["b", "a", "b", "b"]):
        assert_same(layer(x), linear(x))
    layer.remove_job("b")
    assert list(layer.jobs) == ["a"]
    with pytest.raises(KeyError):
        layer.job_parameters("b")


def test_saved_for_backward(llama: Any) -> None:
    """Beyond x and parameters: each job's h for its own rows and rank, a seed a job, and eight bytes."""
    _, crew = dropping(llama, "abc")
    layer = crew.layers["model.layers.0.mlp.gate_proj"]
    x = torch.randn(7, 50, 64, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with layer.use_jobs(MIXED), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    ranks = sum(CREW[name]["r"] for name in MIXED if name is not None)
    assert sum(storage.nbytes() for storage in kept.values()) == 4 * 50 * ranks + 3 * 8 + 8
    y.sum().backward()


BAD: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "a mistyped name": (KeyError, "job 'z': not added", lambda crew: crew.use(["a", "z"]).__enter__()),
    "a name for a list": (TypeError, "names: got 'a', wanted a list", lambda crew: crew.use("a").__enter__()),
    "a set of names": (TypeError, "names: got {.*}, wanted a list", lambda crew: crew.use({"a"}).__enter__()),
    "no list at all": (TypeError, "names: got 5, wanted a list", lambda crew: crew.use(5).__enter__()),
    "no names": (ValueError, "names: got none", lambda crew: crew.use([]).__enter__()),
    "a name twice": (ValueError, "name: got 'a', which is a job already", lambda crew: crew.add("a")),
    "a dotted name": (ValueError, "name: got 'x.y', wanted a name without a dot", lambda crew: crew.add("x.y")),
    "a method's name": (ValueError, "name: got 'keys'", lambda crew: crew.add("keys")),
    "rank 0": (ValueError, "r: got 0, wanted a whole number", lambda crew: crew.add("n", r=0)),
    "p = 1": (ValueError, "lora_dropout: got 1.0, wanted a prob", lambda crew: crew.add("n", lora_dropout=1.0)),
    "p in words": (TypeError, "lora_dropout: got str, wanted a num", lambda crew: crew.add("n", lora_dropout="0.1")),
    "alpha in words": (TypeError, "lora_alpha: got str, wanted a num", lambda crew: crew.add("n", lora_alpha="16")),
    "alpha NaN": (ValueError, "lora_alpha: got nan, wanted a finite", lambda crew: crew.add("n", lora_alpha=np.nan)),
    "rank True": (ValueError, "r: got True, wanted a whole number", lambda crew: crew.add("n", r=True)),
    "rank 8.0": (ValueError, "r: got 8.0, wanted a whole number", lambda crew: crew.add("n", r=8.0)),
    "another's state": (
        ValueError,
        "state: job 'c' and it differ",
        lambda c: c.load_state_dict("c", c.state_dict("a")),
    ),
    "another's rank": (ValueError, "state: got .* of shape", lambda c: c.load_state_dict("b", c.state_dict("a"))),
    "no tensors": (
        ValueError,
        "state: got .* of shape NoneType",
        lambda c: c.load_state_dict("a", dict.fromkeys(c.state_dict("a"))),
    ),
    "a job of no one": (KeyError, "job 'z'", lambda crew: crew.parameters("z")),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str, jobs: tuple[nn.Module, Jobs]) -> None:
    kind, words, act = BAD[what]
    _, crew = jobs
    before = {name: crew.state_dict(name) for name in crew.names}
    with pytest.raises(kind, match=words):
        act(crew)
    assert crew.names == list(before)
    for name, state in before.items():
        assert_equal(crew.state_dict(name), state)
    assert all(list(layer.jobs) == list(before) for layer in crew.layers.values())


def test_numpys_numbers_are_numbers(jobs: tuple[nn.Module, Jobs], tmp_path: Path) -> None:
    _, crew = jobs
    crew.add("n", r=np.int64(3), lora_alpha=np.float32(1.5), lora_dropout=np.float64(0.25), use_rslora=np.True_)
    crew.add("plain")
    layer = crew.layers["model.layers.0.mlp.up_proj"]
    job = layer.jobs["n"]
    assert (type(job.scaling), job.scaling, job.lora_dropout) == (float, 1.5 / 3**0.5, 0.25)
    assert layer.jobs["plain"].scaling == 16 / 8
    for name in ("n", "plain"):
        crew.save(name, tmp_path / name)
    numbers = json.loads((tmp_path / "n" / "adapter_config.json").read_text())
    assert [numbers[key] for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")] == [3, 1.5, 0.25, True]
    assert '"lora_alpha": 16,' in (tmp_path / "plain" / "adapter_config.json").read_text()


def test_batches_and_models_that_do_not_fit(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    with crew.use(["a", "b"]), pytest.raises(ValueError, match=r"q_proj, wanted the batch's 2 requests first"):
        model(input_ids=ids(3))
    with pytest.raises(TypeError, match="wanted a plain model"):
        Jobs(get_peft_model(base_model(), lora_config()))
    with pytest.raises(TypeError, match="model: got int"):
        Jobs(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="means no linear layer"):
        Jobs(base_model(), ["nowhere"])


def test_folders_that_do_not_fit(jobs: tuple[nn.Module, Jobs], tmp_path: Path) -> None:
    _, crew = jobs
    with pytest.raises(FileNotFoundError):
        crew.load(tmp_path, "n")
    base = base_model("llama")
    for number, options in enumerate(
        ({"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}}, {"use_dora": True})
    ):
        get_peft_model(copy.deepcopy(base), lora_config(**options)).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError):
            crew.load(tmp_path / str(number), "n")
    assert crew.names == [*CREW] and not any("n" in layer.jobs for layer in crew.layers.values())
