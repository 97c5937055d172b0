"""Jobs in one batch: each trains as it does alone in plain PEFT, whoever is beside it, joins, pauses or leaves."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from crews import (
    CREW,
    MIXED,
    RATES,
    State,
    assert_close_to,
    assert_equal,
    crewed,
    dropping,
    fresh,
    gradients,
    ids,
    losses,
    read_gradients,
)
from models import base_model
from peft import PeftModel, get_peft_model_state_dict
from tolerance import assert_all_close, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import Jobs


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


@pytest.mark.parametrize("name", CREW)
def test_masks_do_not_depend_on_company(llama: Any, name: str) -> None:
    """A job beside others and alone in its Jobs, from the same torch seed: a layer's gradients to the bit, the model's
    losses and gradients to the order of the base's sums. Each of them, for the first's place is the same in both."""
    together, only = dropping(llama, "abc"), dropping(llama, name)
    x, batch = torch.randn(7, 6, 64), ids()
    mine = [row for row, other in enumerate(MIXED) if other == name]
    alone_names = [name] * len(mine)
    ys, grads = [], []
    for (_, crew), rows, names in ((together, list(range(7)), MIXED), (only, mine, alone_names)):
        layer = crew.layers["model.layers.1.mlp.up_proj"]
        torch.manual_seed(3)
        layer.base_layer.weight.data.zero_()  # its own sums may differ with the number of rows
        with layer.use_jobs(names):
            y = layer(x[rows])
            y.backward(torch.ones_like(y))
        ys.append(y[mine] if names is MIXED else y)
        grads.append([p.grad for p in layer.job_parameters(name)])
    torch.testing.assert_close(*ys)  # the layer's term lands on rows that lie together in one step, else in two
    for one, other in zip(*grads, strict=True):
        assert_same(one, other)
    torch.manual_seed(5)
    beside = gradients(*together, batch, MIXED)
    torch.manual_seed(5)
    alone = gradients(*only, batch[mine], alone_names)
    assert_close_to({key: t for key, t in beside.items() if key.startswith(f"{name} ")}, alone)
    torch.manual_seed(6)
    other_masks = gradients(*only, batch[mine], alone_names)
    assert not torch.allclose(other_masks[f"{name} loss"], alone[f"{name} loss"]), "nothing dropped"


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
