"""`python examples`, which is `make demo`: each example in turn, none after one that failed."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))


def demo(monkeypatch: pytest.MonkeyPatch, code: Any) -> list[list[str]]:
    """What the demo runs where each example leaves with `code`."""
    ran, run_path = [], runpy.run_path

    def run(path: str, run_name: str) -> None:
        assert Path(path).exists() and run_name == "__main__"
        ran.append([Path(path).stem, *sys.argv[1:]])
        raise SystemExit(code)

    monkeypatch.setattr(runpy, "run_path", run)
    monkeypatch.setattr(sys, "argv", ["examples"])
    try:
        run_path(str(EXAMPLES), run_name="__main__")
    except SystemExit as end:
        assert end.code == code != 0
    return ran


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--quick", 2)])
def test_what_the_demo_does_not_take_starts_none(word: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_path = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda *_, **__: pytest.fail("an example was started"))
    monkeypatch.setattr(sys, "argv", ["examples", word])
    with pytest.raises(SystemExit) as end:
        run_path(str(EXAMPLES), run_name="__main__")
    assert end.value.code == code


def test_each_in_turn_from_the_fine_tune_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = demo(monkeypatch, 0)
    assert [name for name, *_ in ran] == ["finetune", "multi_tenant", "multi_job", "dialogue_summarization"]
    assert ran[0] == ["finetune"], "as documented, with nothing said"
    for name, *words in ran[:3]:
        assert importlib.import_module(name).parse(words).out == Path("out") / name


def test_none_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo(monkeypatch, "no such model") == [["finetune"]]
