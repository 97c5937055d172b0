"""Whose batch `Jobs.use` says: its own thread's and task's, one at a time, and nobody's afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tolerance import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora import Jobs, MultiLoRALinear

K = 16


class Crewed:
    """A small model, its jobs a and b, an input, and what each should be."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        self.x = torch.randn(4, 3, K)
        self.base = self.model(self.x).detach()
        self.jobs = Jobs(self.model)
        self.alone: dict[str, Tensor] = {}
        for name in "ab":
            self.jobs.add(name, r=2)
            for p in self.jobs.parameters(name):
                nn.init.normal_(p)
            with self.jobs.use([name] * 4):
                self.alone[name] = self.model(self.x).detach()

    def assert_outside(self) -> None:
        assert_same(self.model(self.x), self.base)
        assert all(layer.crew.mapping is None for layer in self.jobs.layers.values())


@pytest.fixture
def crew() -> Crewed:
    torch.manual_seed(0)
    return Crewed()


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., None]]:
    """Runs a function in another thread, and raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda act, *args: pool.submit(act, *args).result()


def test_a_second_threads_use_is_refused(crew: Crewed, elsewhere: Callable[..., None]) -> None:
    def other() -> None:
        with pytest.raises(RuntimeError, match="use: got a batch while another thread or task is inside"):
            crew.jobs.use(["b"] * 4).__enter__()

    with crew.jobs.use(["a"] * 4):
        elsewhere(other)
        assert_same(crew.model(crew.x), crew.alone["a"])
    crew.assert_outside()

    def after() -> None:
        with crew.jobs.use(["b"] * 4):
            assert_same(crew.model(crew.x), crew.alone["b"])

    elsewhere(after)
    crew.assert_outside()


def test_other_threads_and_their_backward_are_outside(crew: Crewed, elsewhere: Callable[..., None]) -> None:
    def other() -> None:
        x = crew.x.clone().requires_grad_()
        assert_same(crew.model(x), crew.base)
        with pytest.raises(RuntimeError, match="recomputed outside of `use`"):
            checkpoint(crew.model, x, use_reentrant=False).sum().backward()

    with crew.jobs.use(["a"] * 4):
        elsewhere(other)
    crew.assert_outside()


def test_threads_that_race_never_mix_jobs(crew: Crewed) -> None:
    """Each batch is its own job's, or refused; nothing stays behind."""
    wrong, interval = [], sys.getswitchinterval()

    def work(name: str) -> None:
        for _ in range(100):
            with contextlib.suppress(RuntimeError), crew.jobs.use([name] * 4):
                if not torch.equal(crew.model(crew.x), crew.alone[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    crew.assert_outside()


def test_a_second_tasks_use_is_refused(crew: Crewed) -> None:
    async def first(entered: asyncio.Event, done: asyncio.Event) -> None:
        with crew.jobs.use(["a"] * 4):
            entered.set()
            await done.wait()
            assert_same(crew.model(crew.x), crew.alone["a"])

    async def both() -> None:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(entered, done))
        await entered.wait()
        with pytest.raises(RuntimeError, match="another thread or task is inside"):
            crew.jobs.use(["b"] * 4).__enter__()
        assert_same(crew.model(crew.x), crew.base)
        done.set()
        await task

    asyncio.run(both())
    crew.assert_outside()


def test_an_inner_use_takes_its_place_until_it_ends(crew: Crewed) -> None:
    with crew.jobs.use(["a"] * 4):
        for names, wanted in ((["b"] * 4, crew.alone["b"]), ([None] * 4, crew.base)):
            with crew.jobs.use(names):
                assert_same(crew.model(crew.x), wanted)
        assert_same(crew.model(crew.x), crew.alone["a"])
    crew.assert_outside()


def test_uses_that_end_in_another_order_say_so_and_leave_nothing_behind(crew: Crewed) -> None:
    outer, inner = crew.jobs.use(["a"] * 4), crew.jobs.use(["b"] * 4)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="use: ended where another is the innermost"):
        outer.__exit__(None, None, None)
    assert_same(crew.model(crew.x), crew.alone["b"])
    inner.__exit__(None, None, None)
    crew.assert_outside()


def test_autograds_threads_recompute_for_the_batch_that_runs(
    crew: Crewed, elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where they are other threads than the one inside: told by the device of x alone."""
    layer = crew.jobs.layers["0"]
    on_a_gpu = torch.empty(4, 3, K, device="meta")
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)

    def recompute() -> None:
        assert layer.crew.current(on_a_gpu) is layer.crew.mapping is not None

    with crew.jobs.use(["a"] * 4):
        elsewhere(recompute)
    with pytest.raises(RuntimeError, match="recomputed outside of `use`"):
        layer.crew.current(on_a_gpu)


def test_copies_and_files_made_inside_are_outside(crew: Crewed) -> None:
    file = io.BytesIO()
    with crew.jobs.use(["a"] * 4):
        copied = copy.deepcopy(crew.model)
        torch.save(crew.model, file)
    file.seek(0)
    for model in (copied, torch.load(file, weights_only=False)):
        assert_same(model(crew.x), crew.base)
        first = model[0]
        assert isinstance(first, MultiLoRALinear)
        with first.use_jobs(["a"] * 4):
            assert_same(model(crew.x), crew.alone["a"])
