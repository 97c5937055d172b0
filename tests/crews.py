"""Jobs of one model: plain PEFT's adapters on copies of it, the same as `fastlora.Jobs`, and a step of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import VOCABULARY, lora_config
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tolerance import assert_same
from torch import Tensor, nn

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


def dropping(llama: tuple[nn.Module, dict[str, State]], names: str) -> tuple[nn.Module, Jobs]:
    model = copy.deepcopy(llama[0])
    crew = {name: {**CREW[name], "lora_dropout": 0.3 if name != "b" else 0.05} for name in names}
    return model, crewed(model, llama[1], crew)


def assert_equal(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    for key, t in found.items():
        assert_same(t, wanted[key])


def assert_close_to(found: State, wanted: State) -> None:
    """The same sums in another order: a model's gradients, 2 layers deep."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    for key, t in found.items():
        torch.testing.assert_close(t, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max()) + 1e-8)
