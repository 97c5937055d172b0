"""Every run interprets the real Triton kernels on CPU tensors, or runs them on the GPU where there is one."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator

import hypothesis
import interpreting
import pytest
import torch
from poison import poisoned

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are first imported
    interpreting.quicken()
    interpreting.truncate()
    interpreting.want_bools()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in the programs that tests start

hypothesis.settings.register_profile("fastlora", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fastlora")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A module's own fixture is made in one worker; what is marked slow runs when asked for by marker or by name."""
    for item in items:
        fixtures = itertools.chain(*item._fixtureinfo.name2fixturedefs.values())  # type: ignore[attr-defined]
        if any(fixture.scope == "module" for fixture in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if "slow" in config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


def pytest_collection_finish() -> None:
    """What was imported stays: half a million objects that each full collection would look at, 0.4 s of it."""
    gc.freeze()


class _AtOnce:
    """Says of each failure what it was as it comes: `make gpu` may be cut off before the summary."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\n{report.nodeid}\n" + "\n".join(report.longreprtext.splitlines()[-12:]), flush=True)


class _Afresh:
    """Ends a worker whose GPU no longer answers it, as after an illegal access: every later test of it would fail too,
    where xdist starts another in its place."""

    def pytest_runtest_logfinish(self) -> None:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") and torch.cuda.is_available():
        config.pluginmanager.register(_Afresh())
    if config.option.tbstyle == "no" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    """A small Llama, a module's own, for tenants of a bank."""
    from models import base_model

    torch.manual_seed(0)
    return base_model()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test puts its tensors: interpreted on the CPU, and the same test compiled on the GPU."""
    from fastlora_kernels import INTERPRET

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (request.param == "cpu") != INTERPRET:
        pytest.skip(f"the kernels are {'interpreted' if INTERPRET else 'compiled'} in this run (TRITON_INTERPRET)")
    return request.param


@pytest.fixture
def poison() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, too, run together: groups and gated MLPs as one op."""
    from fastlora import ops

    monkeypatch.setattr(ops, "FEW_INPUTS", 0)


@pytest.fixture
def groups_alone(however_few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups run however few the rows, and MLPs, which have tests of their own, layer by layer."""
    from fastlora.peft import gated

    monkeypatch.setattr(gated._Gated, "fastlora_gated", False)
