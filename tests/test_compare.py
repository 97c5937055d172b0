"""What reads a run: the results contract, compare, report and the plots, on made-up records with known answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import records
from benchmarks.plots import ADAPTERS, RANK, ROWS, Axis, draw, series
from benchmarks.records import NAMES, Record, Results

STAMP = {
    "suite": "linear", "device": "A Machine", "slug": "a-machine", "kind": "cpu", "commit": "abc1234", "dirty": False,
    "date": "2026-11-24", "versions": {"torch": "2.13.0"}, "threads": 2,
    "ceilings": {"copy_gb_s": 20.0, "matmul_tflop_s": {"fp32": 0.1}},
}  # fmt: skip
BASE = Record(
    "linear", "case", "forward", "frozen", 1.0, 0.99, 1.01, 8.0, 1.0, 0.5, 1e-7, 128, 64, 64, 16, "fp32", "fp32", 0.0, 1
)


def run_of(slower: float = 1.0) -> list[Record]:
    """Frozen, PEFT at 1.5 and fastlora at 1.2·slower of it, for three sizes and two ranks."""
    found = []
    for M in (1, 16, 256):
        for R in (8, 16):
            for impl, ratio in (("frozen", 1.0), ("peft", 1.5), ("fastlora", 1.2 * slower)):
                ms = 0.1 * M * ratio
                sizes = dict(M=M, R=R, case=f"q M{M} r{R}", impl=impl)
                found.append(
                    replace(BASE, **sizes, median_ms=ms, p20_ms=0.99 * ms, p80_ms=1.01 * ms, ratio_to_frozen=ratio)
                )
    return found


def written(folder: Path, found: list[Record], **stamp: object) -> Path:
    records.write(folder / "linear.json", {**STAMP, **stamp}, found)
    return folder


def test_the_contract_survives_the_file(tmp_path: Path) -> None:
    found = run_of()
    path = written(tmp_path, found) / "linear.json"
    held = json.loads(path.read_text())
    assert list(held) == ["stamp", "records"]
    assert tuple(held["records"][0]) == NAMES == (
        "suite", "case", "pass", "impl", "median_ms", "p20_ms", "p80_ms", "peak_mb", "ratio_to_frozen",
        "roof_fraction", "rel_error", "M", "K", "N", "R", "dtype", "adapter_dtype", "p", "G",
    )  # fmt: skip
    assert records.read(path).records == found
    assert not list(tmp_path.glob("*.part"))


def test_compare_finds_the_regression_and_only_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, same, slow = (written(tmp_path / name, run_of(s)) for name, s in (("a", 1.0), ("b", 1.03), ("c", 1.2)))
    assert cli.main(["compare", str(old), str(same)]) == 0
    assert "0 moved" in capsys.readouterr().out
    assert cli.main(["compare", str(old), str(slow / "linear.json")]) == 1
    said = capsys.readouterr().out
    assert said.count("fastlora\n") == 6 and "+20.0%" in said and "peft" not in said
    assert cli.main(["compare", str(slow), str(old)]) == 0, "faster is no regression"
    assert cli.main(["compare", str(old), str(slow), "--impl", "peft"]) == 0
    assert cli.main(["compare", str(old), str(slow), "--noise", "0.25"]) == 0


def test_wide_quantiles_are_noise(tmp_path: Path) -> None:
    shaky = [replace(r, p20_ms=0.8 * r.median_ms, p80_ms=1.2 * r.median_ms) for r in run_of(1.2)]
    assert cli.main(["compare", str(written(tmp_path / "a", run_of())), str(written(tmp_path / "b", shaky))]) == 0


def test_a_slower_machine_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All times doubled: the ratios to the frozen layer are what they were."""
    doubled = [replace(r, median_ms=2 * r.median_ms, p20_ms=2 * r.p20_ms, p80_ms=2 * r.p80_ms) for r in run_of()]
    folders = written(tmp_path / "a", run_of()), written(tmp_path / "b", doubled, device="Another")
    assert cli.main(["compare", *map(str, folders)]) == 0
    assert "two machines: A Machine and Another" in capsys.readouterr().out


def test_what_the_gate_refuses_is_lost_and_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = [r for r in run_of() if (r.impl, r.M) != ("fastlora", 16)]
    old = written(tmp_path / "old", run_of())
    new = written(tmp_path / "new", kept, refused=["q M16 r8 fastlora: da: error 1.0e-05, allowed 9.0e-07"])
    assert cli.main(["compare", str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "lost: linear: q M16 r8 forward fastlora: refused, da: error 1.0e-05, allowed 9.0e-07" in said
    assert "lost: linear: q M16 r16 forward fastlora: not in NEW, where others ran it" in said
    assert "0 slower and 2 lost (fastlora)" in said
    assert cli.main(["compare", str(old), str(new), "--impl", "peft"]) == 0
    assert cli.main(["compare", str(new), str(old)]) == 0, "what is new is no loss"


def test_all_of_an_implementation_lost_is_a_regression(tmp_path: Path) -> None:
    others = [r for r in run_of() if r.impl != "fastlora"]
    folders = written(tmp_path / "old", run_of()), written(tmp_path / "new", others)
    assert cli.main(["compare", *map(str, folders)]) == 1


def test_a_case_that_raised_is_lost_and_one_that_was_not_come_to_is_not(tmp_path: Path) -> None:
    early = [r for r in run_of() if r.M < 256]
    old, short = written(tmp_path / "old", run_of()), written(tmp_path / "short", early)
    assert cli.main(["compare", str(old), str(short)]) == 0
    raised = written(tmp_path / "raised", early, refused=["q M256 r8: OutOfMemoryError: no room"])
    assert cli.main(["compare", str(old), str(raised)]) == 1


@pytest.mark.parametrize("change, said", [
    ({"records": {"a": 1}}, "got records of type dict, wanted a list"),
    ({"records": [7]}, "record 0 has the wrong fields: 7"),
    ({"median_ms": 0}, "record 0 has median_ms 0, wanted a positive number"),
    ({"median_ms": "fast"}, "record 0 has median_ms 'fast', wanted a positive number"),
    ({"p20_ms": float("nan")}, "record 0 has p20_ms nan, wanted a positive number"),
    ({"M": True}, "record 0 has M True, wanted a whole number"),
    ({"case": None}, "record 0 has case None, wanted text"),
    ({"ratio_to_frozen": "1"}, "record 0 has ratio_to_frozen '1', wanted a number or null"),
    ({"device": None}, "the stamp's device is None, wanted str"),
    ({"versions": ...}, "the stamp has no versions, wanted suite, device"),
    ({"suite": "quick"}, "the stamp's suite is 'quick', wanted one of linear"),
    ({"ceilings": {}}, "the stamp's ceilings are {}, wanted copy_gb_s"),
    ({"refused": "one"}, "the stamp's refused is 'one', wanted a list of lines"),
    ({"eager": [1]}, "the stamp's eager is [1], wanted a list of lines"),
], ids=str)  # fmt: skip
def test_a_malformed_file_is_one_line_to_compare_and_report(
    change: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (written(tmp_path / name / "a-machine", run_of()) for name in ("good", "bad"))
    held = json.loads((bad / "linear.json").read_text())
    for name, value in change.items():
        first = held["records"][0]
        place = held if name == "records" else first if name in NAMES and name != "suite" else held["stamp"]
        if value is ...:
            del place[name]
        else:
            place[name] = value
    (bad / "linear.json").write_text(json.dumps(held))
    page = tmp_path / "page.md"
    report_of = ["report", "--results", str(tmp_path / "bad"), "--out", str(page)]
    for words in (["compare", str(good), str(bad)], ["compare", str(bad), str(good)], report_of):
        assert cli.main(words) == 2, words
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not page.exists()


def test_a_malformed_run_is_one_line_and_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device, page = written(tmp_path / "results" / "a-machine", run_of()), tmp_path / "page.md"
    for text, said in (
        ("no", "not JSON"),
        ("[]", "got list, wanted the parts"),
        ('{"tune": {}}', "part tune has state"),
    ):
        (device / "run.json").write_text(text)
        assert cli.main(["report", "--results", str(device.parent), "--out", str(page)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not page.exists()


@pytest.mark.parametrize("words, said", [
    (["compare", "nowhere.json", "nowhere.json"], "nowhere.json: No such file"),
    (["compare", "{run}", "{empty}"], "a folder without results"),
    (["compare", "{run}", "{text}"], "not JSON"),
    (["compare", "{run}", "{version}"], "format 99, wanted format 1"),
    (["compare", "{run}", "{fields}"], "wrong fields: \\['surplus'\\]"),
    (["compare", "{run}", "{run}", "--impl", "nobody"], "wanted all or one of fastlora, frozen, peft"),
    (["compare", "{run}", "{run}", "--noise", "2"], "--noise: got 2.0"),
    (["report", "--results", "{empty}", "--out", "{empty}/page.md"], "no results, wanted"),
    (["report", "--results", "{results}", "--out", "{empty}"], "--out: got .*, wanted a file that can be written"),
    (["report", "--results", "{results}", "--out", "{text}/linear.json/page.md"], "--out: got .*, wanted a file"),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_bad_input_is_one_line_and_no_file(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("run", "results", "empty", "text", "version", "fields")}
    for place in places.values():
        place.mkdir()
    written(places["run"], run_of())
    written(places["results"] / "a-machine", run_of())
    (places["text"] / "linear.json").write_text("no")
    held = json.loads((places["run"] / "linear.json").read_text())
    (places["version"] / "linear.json").write_text(json.dumps({**held, "stamp": {"format": 99}}))
    surplus = [{**line, "surplus": 1} for line in held["records"]]
    (places["fields"] / "linear.json").write_text(json.dumps({**held, "records": surplus}))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([word.format(**places) for word in words]) == 2
    captured = capsys.readouterr()
    assert re.search(said, captured.err) and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_report_says_what_the_records_say(tmp_path: Path) -> None:
    device = written(tmp_path / "results" / "a-machine", run_of())
    outcome = {"state": "ok", "seconds": 1.5, "ideal_bytes": {"expand": 2**20, "dx": 2**20, "dy": 2**20}}
    names = ("_shrink_kernel", "_persistent_kernel", "_reduce_kernel", "distribution_kernel", "_dy_kernel")
    launches = [
        {"kernel": name, "dram__bytes_read.sum": size * 2**20, "dram__bytes_write.sum": 2**19}
        for size, name in enumerate(names)
    ]
    (device / "run.json").write_text(json.dumps({"profile": {**outcome, "measured": launches}}))
    page = tmp_path / "docs" / "page.md"
    assert cli.main(["report", "--results", str(tmp_path / "results"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "| forward | fp32 | 0 | 6 | 1.50 (1.50) | 1.20 (1.20) |" in text, text
    assert "| forward | fp32 | 0 | 0.80 (0.80) |" in text
    assert "never slower than PEFT (median ≤ 1.0000, worst ≤ 1.05): 0.8000 (0.8000), reached" in text
    assert "### targets" not in text, "a CPU has no GPU's targets"
    assert "with dropout" not in text, "a target without records is not claimed"
    assert "| expand | 1.5 | 1.0 | 1.50 |\n| dy | 4.5 | 1.0 | 4.50 |" in text, "each launch by its kernel's name"
    assert "commit `abc1234`" in text
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (page.parent / picture).stat().st_size > 5_000


def test_plots_are_drawn_for_what_there_is(tmp_path: Path) -> None:
    names = [path.name for path in draw(Results(STAMP, run_of()), tmp_path)]
    assert names == ["linear-rows.png", "linear-rank.png", "linear-memory.png", "linear-roof.png"]
    assert draw(Results(STAMP, [BASE]), tmp_path / "one") == []


def test_a_picture_no_longer_drawn_goes(tmp_path: Path) -> None:
    for name in ("linear-adapters.png", "block-rows.png"):
        (tmp_path / name).write_bytes(b"old")
    draw(Results(STAMP, run_of()), tmp_path)
    assert not (tmp_path / "linear-adapters.png").exists() and (tmp_path / "block-rows.png").exists()


def points(axis: Axis, *cases: str, **values: object) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The series of one implementation on these cases; the case's number is its y."""
    found = []
    for number, case in enumerate(cases):
        sizes = {"M": r"\bM(\d+)", "R": r"r(?:\d+/)*(\d+)", "G": r"(?:uniform|distinct|zipf) (\d+)"}
        read = {name: int(at[1]) for name, words in sizes.items() if (at := re.search(words, case))}
        found.append(replace(BASE, **{"case": case, "impl": "fastlora", "median_ms": float(number), **read, **values}))
    return series(found, axis, lambda r: r.median_ms)


def test_a_line_joins_points_that_differ_in_the_axis_alone() -> None:
    """Not other distributions of adapters, layers adapted, rows without adapter, mixed ranks, models, or eval."""
    llama = "llama 4x512 batch 32x1"
    by_rank = points(
        RANK, f"{llama} distinct 32 r4 all", f"{llama} distinct 32 r16 all", f"{llama} uniform 8 r16 all",
        f"{llama} distinct 32 r16 qv", f"{llama} distinct 32 r8/16/32/64 all", suite="multi",
    )  # fmt: skip
    assert by_rank == {f"forward: {llama} distinct 32 all": {"fastlora": [(4, 0.0), (16, 1.0)]}}
    by_adapters = points(
        ADAPTERS, f"{llama} uniform 2 r16 all", f"{llama} uniform 8 r16 all", f"{llama} distinct 32 r16 all",
        f"{llama} zipf 64 r16 all", f"{llama} uniform 128 r16 all 1 in 2 base", suite="multi",
    )  # fmt: skip
    assert by_adapters == {f"forward: {llama} uniform r16 all": {"fastlora": [(2, 0.0), (8, 1.0)]}}
    assert points(ROWS, "qwen.mlp M256 r16 bf16 p0", "qwen.qkv M512 r16 bf16 p0", suite="block") == {}
    assert points(ROWS, "eval M1 fp32 p0", "training M4 fp32 p0", suite="overhead") == {}
    models = [replace(BASE, suite="step", case=f"llama 4x{n} batch 4x{n // 4} r16 p0", M=n) for n in (256, 512)]
    assert series(models, ROWS, lambda r: r.median_ms) == {}


def test_the_median_over_layers_is_of_the_same_layers_at_each_point() -> None:
    names = ["q M1 r16", "k M1 r16", "q M8 r16", "k M8 r16", "down M8 r16"]
    assert points(ROWS, *names) == {"forward: r16\nmedian of q, k": {"fastlora": [(1, 0.5), (8, 2.5)]}}
    assert points(ROWS, "q M1 r16", "q M8 r16", "k M8 r16") == {"forward: r16\nq": {"fastlora": [(1, 0.0), (8, 1.0)]}}
    runs = [replace(BASE, case=f"{q} M{M} r16", M=M, impl=i) for q in "qk" for M in (1, 8) for i in ("frozen", "peft")]
    refused = [r for r in runs if (r.case, r.impl) != ("k M8 r16", "peft")]
    (panel,) = series(refused, ROWS, lambda r: r.median_ms).values()
    assert panel == {"frozen": [(1, 1.0), (8, 1.0)], "peft": [(1, 1.0)]}, "one layer's time is not the median of two"
