"""Jobs in one batch: each trains as it does alone in plain PEFT, whoever is beside it, joins, pauses or leaves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, base_model, lora_config
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import Jobs

CREW = {
    "a": {"r": 4, "lora_alpha": 6},
    "b": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "c": {"r": 3, "lora_alpha": 2, "lora_bias": True},
}
MIXED = ["a", "c", "b", "a", None, "c", "a"]
RATES = {"a": 1e-2, "b": 3e-3, "c": 1e-3}
State = dict[str, Tensor]


def ids(rows: int = len(MIXED), length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def fresh(model: nn.Module, family: str = "llama", crew: dict[str, Any] = CREW) -> dict[str, tuple[PeftModel, State]]:
    """Each job alone in plain PEFT on a copy of the model, with a B that is not zero, and the state it begins from."""
    alone = {}
    for name, options in crew.items():
        peft = get_peft_model(copy.deepcopy(model), lora_config(family, **options)).train()
        alone[name] = peft, {key: t.detach().clone() for key, t in get_peft_model_state_dict(peft).items()}
    return alone


def crewed(model: nn.Module, starts: dict[str, State], crew: dict[str, Any] = CREW, **options: Any) -> Jobs:
    jobs = Jobs(model, **options)
    for name, numbers in crew.items():
        jobs.add(name, **numbers)
        jobs.load_state_dict(name, starts[name])
    return jobs


def losses(logits: Tensor, labels: Tensor, names: list[str | None]) -> dict[str, Tensor]:
    """Next-token loss of each job: the mean over its own rows."""
    found = {}
    for name in dict.fromkeys(filter(None, names)):
        mine = [row for row, other in enumerate(names) if other == name]
        found[name] = nn.functional.cross_entropy(logits[mine, :-1].flatten(0, 1), labels[mine, 1:].flatten())
    return found


def optimizer_of(parameters: Any, name: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATES[name])


def train_alone(peft: PeftModel, name: str, batches: list[Tensor]) -> State:
    optimizer = optimizer_of([p for p in peft.parameters() if p.requires_grad], name)
    found, mine = {}, [row for row, other in enumerate(MIXED) if other == name]
    for number, batch in enumerate(batches):
        loss = losses(peft(input_ids=batch[mine]).logits, batch[mine], [name] * len(mine))[name]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"{name} loss {number}"] = loss.detach()
    return found | {f"{name} {key}": t.detach().clone() for key, t in get_peft_model_state_dict(peft).items()}


def train_together(model: nn.Module, jobs: Jobs, batches: list[Tensor]) -> State:
    optimizers = {name: optimizer_of(jobs.parameters(name), name) for name in jobs.names}
    found: State = {}
    for number, batch in enumerate(batches):
        with jobs.use(MIXED):
            each = losses(model(input_ids=batch).logits, batch, MIXED)
            sum(each.values()).backward()  # type: ignore[union-attr]
        for name, optimizer in optimizers.items():
            optimizer.step()
            optimizer.zero_grad()
            found[f"{name} loss {number}"] = each[name].detach()
    return found | {f"{name} {key}": t for name in jobs.names for key, t in jobs.state_dict(name).items()}


def test_ten_steps_are_those_of_each_job_alone_in_plain_peft() -> None:
    """Losses of every step and the weights after the last; each beside PEFT's own in float64."""
    draws = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = base_model("llama").train()
        batches = [ids() for _ in range(10)]
        alone = fresh(model)
        exact: State = {}
        usual: State = {}
        for name, (peft, _) in alone.items():
            exact |= train_alone(copy.deepcopy(peft).double(), name, batches)
            usual |= train_alone(peft, name, batches)
        together = crewed(model, {name: state for name, (_, state) in alone.items()})
        draws.append((train_together(model, together, batches), usual, exact))
    assert_all_close(draws)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, dict[str, State]]:
    torch.manual_seed(7)
    model = base_model("llama").train()
    return model, {name: state for name, (_, state) in fresh(model).items()}


@pytest.fixture
def jobs(llama: tuple[nn.Module, dict[str, State]]) -> tuple[nn.Module, Jobs]:
    model = copy.deepcopy(llama[0])
    return model, crewed(model, llama[1])


def gradients(model: nn.Module, jobs: Jobs, batch: Tensor, names: list[str | None], **options: Any) -> State:
    """Every gradient of one step, by job."""
    for name in jobs.names:
        for p in jobs.parameters(name):
            p.grad = None
    with jobs.use(names):
        each = losses(model(input_ids=batch, **options).logits, batch, names)
        sum(each.values()).backward()  # type: ignore[union-attr]
    return read_gradients(jobs) | {f"{name} loss": loss.detach() for name, loss in each.items()}


def read_gradients(jobs: Jobs) -> State:
    """Copies by job, layer and factor, of those that have one."""
    return {
        f"{name} {layer} {key}": p.grad.clone()
        for name in jobs.names
        for layer, module in jobs.layers.items()
        for key, p in module.jobs[name].named_parameters()
        if p.grad is not None
    }


def assert_equal(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    for key, t in found.items():
        assert_same(t, wanted[key])


def assert_close_to(found: State, wanted: State) -> None:
    """The same sums in another order: a model's gradients, 2 layers deep."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    for key, t in found.items():
        torch.testing.assert_close(t, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()) + 1e-8)


def test_outside_of_use_the_model_is_its_base(llama: Any, jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    batch = ids()
    assert_same(model(input_ids=batch).logits, llama[0](input_ids=batch).logits)
    with crew.use([None] * len(batch)):
        assert_same(model(input_ids=batch).logits, llama[0](input_ids=batch).logits)
    crew.close()
    assert [type(m) for m in model.modules()] == [type(m) for m in llama[0].modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_who_has_no_row_gets_no_gradient_and_its_optimizer_leaves_it(jobs: tuple[nn.Module, Jobs]) -> None:
    """Not zero but None: AdamW would decay and go on by momentum."""
    model, crew = jobs
    optimizer = optimizer_of(crew.parameters("b"), "b")
    gradients(model, crew, ids(), MIXED)
    optimizer.step()
    optimizer.zero_grad()
    before = crew.state_dict("b")
    found = gradients(model, crew, ids(5), ["a", "c", "a", None, "c"])
    assert not any(key.startswith("b ") for key in found) and any(key.startswith("a ") for key in found)
    optimizer.step()
    assert_equal(crew.state_dict("b"), before)


def test_others_rows_add_exactly_nothing(jobs: tuple[nn.Module, Jobs]) -> None:
    """A job whose neighbour's rows are NaN has the gradients, to the bit, that it has beside any other neighbour."""
    _, crew = jobs
    layer = crew.layers["model.layers.0.self_attn.q_proj"]
    x, dy = torch.randn(7, 6, 64), torch.randn(7, 6, 64)
    sound: State = {}
    for spoilt in (False, True):
        mine = torch.tensor([name == "a" for name in MIXED])[:, None, None]
        other = torch.full_like(x, float("nan")) if spoilt else torch.randn_like(x)
        with layer.use_jobs(MIXED):
            y = layer(torch.where(mine, x, other))
        for p in layer.job_parameters("a"):
            p.grad = None
        y.backward(torch.where(mine, dy, other))
        found = {str(p.shape): p.grad.clone() for p in layer.job_parameters("a")}  # type: ignore[union-attr]
        sound = sound or found
        assert all(t.isfinite().all() for t in found.values())
        assert_equal(found, sound)
        del y


def test_rows_may_come_in_any_order(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    batch = ids()
    usual = gradients(model, crew, batch, MIXED)
    for order in ([0, 3, 6, 2, 1, 5, 4], [4, 5, 6, 3, 1, 0, 2]):
        shuffled = gradients(model, crew, batch[order], [MIXED[row] for row in order])
        assert_close_to(shuffled, usual)


def dropping(llama: tuple[nn.Module, dict[str, State]], names: str) -> tuple[nn.Module, Jobs]:
    model = copy.deepcopy(llama[0])
    crew = {name: {**CREW[name], "lora_dropout": 0.3 if name != "b" else 0.05} for name in names}
    return model, crewed(model, llama[1], crew)


def test_masks_do_not_depend_on_company(llama: Any) -> None:
    """A job beside others and alone in its Jobs, from the same torch seed: one layer to the bit, the model's losses
    and gradients to the order of the base's sums."""
    together, only = dropping(llama, "abc"), dropping(llama, "a")
    x, batch = torch.randn(7, 6, 64), ids()
    mine = [row for row, name in enumerate(MIXED) if name == "a"]
    ys, grads = [], []
    for (_, crew), rows, names in ((together, list(range(7)), MIXED), (only, mine, ["a"] * 3)):
        layer = crew.layers["model.layers.1.mlp.up_proj"]
        torch.manual_seed(3)
        layer.base_layer.weight.data.zero_()  # its own sums may differ with the number of rows
        with layer.use_jobs(names):
            y = layer(x[rows])
            y.backward(torch.ones_like(y))
        ys.append(y[mine] if len(rows) > 3 else y)
        grads.append([p.grad for p in layer.job_parameters("a")])
    assert_same(*ys)
    for one, other in zip(*grads, strict=True):
        assert_same(one, other)
    torch.manual_seed(5)
    beside = gradients(*together, batch, MIXED)
    torch.manual_seed(5)
    alone = gradients(*only, batch[mine], ["a"] * 3)
    assert_close_to({key: t for key, t in beside.items() if key.startswith("a ")}, alone)
    torch.manual_seed(6)
    assert not torch.allclose(gradients(*only, batch[mine], ["a"] * 3)["a loss"], alone["a loss"]), "nothing dropped"


def test_jobs_drop_different_elements(llama: Any) -> None:
    _, crew = dropping(llama, "ac")
    layer = crew.layers["model.layers.0.self_attn.q_proj"]
    x = torch.ones(2, 6, 64, requires_grad=True)
    for job in layer.jobs.values():
        nn.init.ones_(job.lora_A.weight)
        nn.init.ones_(job.lora_B.weight)
    layer.base_layer.weight.data.zero_()
    with layer.use_jobs(["a", "c"]):
        layer(x).sum().backward()
    kept = x.grad != 0  # type: ignore[operator]
    assert not torch.equal(kept[0], kept[1]) and 0.5 < kept.double().mean() < 0.9


def test_evaluation_drops_nothing(llama: Any) -> None:
    model, crew = dropping(llama, "abc")
    plain = copy.deepcopy(llama[0])
    usual = crewed(plain, llama[1])
    batch = ids()
    with crew.use(MIXED), usual.use(MIXED), torch.no_grad():
        assert_same(model.eval()(input_ids=batch).logits, plain.eval()(input_ids=batch).logits)
        assert not torch.equal(model.train()(input_ids=batch).logits, plain.train()(input_ids=batch).logits)


def test_a_job_joins_another_finishes(llama: Any, jobs: tuple[nn.Module, Jobs]) -> None:
    """Parameters stay the objects that optimizers hold, with the values they had; later steps are as if nobody came."""
    model, crew = jobs
    optimizer = optimizer_of(crew.parameters("a"), "a")
    batches = [ids() for _ in range(4)]

    def steps(numbers: range, names: list[str | None]) -> None:
        for number in numbers:
            gradients(model, crew, batches[number], names)
            optimizer.step()

    held = [id(p) for p in crew.parameters("a")]
    steps(range(2), MIXED)
    crew.remove("b")
    crew.add("late", r=16, lora_dropout=0.1)
    assert crew.names == ["a", "c", "late"] and [id(p) for p in crew.parameters("a")] == held
    steps(range(2, 4), ["a", "c", "late", "a", None, "c", "a"])
    changed = crew.state_dict("a")

    other = copy.deepcopy(llama[0])
    apart = crewed(other, {"a": llama[1]["a"]}, {"a": CREW["a"]})
    lone = optimizer_of(apart.parameters("a"), "a")
    for batch in batches:
        gradients(other, apart, batch, ["a" if name == "a" else None for name in MIXED])
        lone.step()
    assert_close_to(changed, apart.state_dict("a"))
    with pytest.raises(KeyError, match="job 'b': not added, or removed; wanted one of: a, c, late"), crew.use(["b"]):
        pass


def test_factors_lie_in_one_pool_and_steps_write_into_it(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    layer = crew.layers["model.layers.0.self_attn.q_proj"]
    assert len({job.lora_A.weight.untyped_storage().data_ptr() for job in layer.jobs.values()}) == 1
    assert len({p.untyped_storage().data_ptr() for job in layer.jobs.values() for p in job.lora_B.parameters()}) == 1
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama: Any, reentrant: bool) -> None:
    """With dropout: the recomputation draws the same masks."""
    model, crew = dropping(llama, "abc")
    batch = ids()
    torch.manual_seed(1)
    usual = gradients(model, crew, batch, MIXED)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    assert_equal(gradients(model, crew, batch, MIXED), usual)
    with crew.use(MIXED):
        loss = model(input_ids=batch).logits.sum()
    with pytest.raises(RuntimeError, match="recomputed outside of `use`; call backward inside it"):
        loss.backward()


def test_recomputing_for_others_is_refused(jobs: tuple[nn.Module, Jobs]) -> None:
    """Shapes alone would not tell: the same ranks, the same numbers of rows."""
    _, crew = jobs
    layer = crew.layers["model.layers.0.self_attn.q_proj"]
    layer.add_job("twin", **CREW["a"])
    x = torch.randn(3, 3, 64, requires_grad=True)
    for first, then in ((["a", "b", "a"], ["a", "a", "b"]), (["a", "b", "a"], ["twin", "b", "twin"])):
        with layer.use_jobs(first):
            y = checkpoint(layer, x, use_reentrant=False)
        with layer.use_jobs(then), pytest.raises(RuntimeError, match="recomputed with another mapping"):
            y.sum().backward()


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


def test_gradients_accumulate(jobs: tuple[nn.Module, Jobs]) -> None:
    """Over batches of other companies, as sums of them apart."""
    model, crew = jobs
    batch = ids()
    halves = [(batch[:4], MIXED[:4]), (batch[4:], MIXED[4:])]
    apart = [gradients(model, crew, rows, names) for rows, names in halves]
    for name in crew.names:
        for p in crew.parameters(name):
            p.grad = None
    for rows, names in halves:
        with crew.use(names):
            sum(losses(model(input_ids=rows).logits, rows, names).values()).backward()  # type: ignore[union-attr]
    keys = {key for found in apart for key in found if "loss" not in key}
    sums = {key: torch.stack([found[key] for found in apart if key in found]).sum(0) for key in keys}
    assert_equal(read_gradients(crew), sums)


def test_the_same_step_twice_is_the_same_to_the_bit(llama: Any) -> None:
    model, crew = dropping(llama, "abc")
    batch = ids()
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        runs.append(gradients(model, crew, batch, MIXED))
    assert_equal(*runs)


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
    "no names": (ValueError, "names: got none", lambda crew: crew.use([]).__enter__()),
    "a name twice": (ValueError, "name: got 'a', which is a job already", lambda crew: crew.add("a")),
    "a dotted name": (ValueError, "name: got 'x.y', wanted a name without a dot", lambda crew: crew.add("x.y")),
    "a method's name": (ValueError, "name: got 'keys'", lambda crew: crew.add("keys")),
    "rank 0": (ValueError, "r: got 0, wanted a whole number", lambda crew: crew.add("n", r=0)),
    "p = 1": (ValueError, "dropout_p: got 1.0, wanted a prob", lambda crew: crew.add("n", lora_dropout=1.0)),
    "another's state": (
        ValueError,
        "state: job 'c' and it differ",
        lambda c: c.load_state_dict("c", c.state_dict("a")),
    ),
    "another's rank": (ValueError, "state: got .* of shape", lambda c: c.load_state_dict("b", c.state_dict("a"))),
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


def test_batches_and_models_that_do_not_fit(jobs: tuple[nn.Module, Jobs]) -> None:
    model, crew = jobs
    with crew.use(["a", "b"]), pytest.raises(ValueError, match="wanted a multiple of the batch's 2 requests"):
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


def test_rows_interleave_with_any_job_count() -> None:
    """Property: any mapping of up to six requests gives what each job's rows give alone."""
    torch.manual_seed(0)
    As = [torch.randn(r, 10, dtype=torch.float64, requires_grad=True) for r in (1, 3)]
    Bs = [torch.randn(7, r, dtype=torch.float64, requires_grad=True) for r in (1, 3)]
    w, x, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 10), (4, 10), (4, 7)))
    for mapping in itertools.product((-1, 0, 1), repeat=4):
        found = []
        for run in (fastlora.functional.jobs_linear, fastlora.reference.jobs_linear):
            x_in = x.clone().requires_grad_()
            y = run(x_in, w, None, As, Bs, [0.5, 2.0], mapping)  # type: ignore[operator]
            grads = torch.autograd.grad(y, [x_in, *As, *Bs], dy, allow_unused=True)
            zero = [torch.zeros_like(t) if g is None else g for t, g in zip([x_in, *As, *Bs], grads, strict=True)]
            found.append([y, *zero])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
