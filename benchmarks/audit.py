"""The compile audit: every kernel at every tile of the tables, compiled for five architectures with no GPU present.

A case runs its own launcher on tensors without storage; Triton's cache hook hands over what would have been launched,
specialised as on a GPU, and that is compiled. Registers, spills, shared memory, occupancy, tensor-core instruction and
narrow loads go to a checked-in table, one case a line, so that a regression shows as a diff.

    python -m benchmarks.audit --arch sm_90 --kernel dx      compile these, print a summary and what fails
    python -m benchmarks.audit --write                       compile all, write audit/triton-<version>.csv
    python -m benchmarks.audit --check                       compile all, exit 1 where a line differs from the table's
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

import fastlora_kernels
from benchmarks.audit_cases import ARCHS, AXES, Case, cases
from fastlora_kernels.tables import table

TABLE = Path(__file__).with_name("audit") / f"triton-{triton.__version__}.csv"
KEY = ("arch", "kernel", "tile", "dtype", "rank", "flags")
GATED = ("sm_80", "sm_90", "sm_100")
"""Where a spill fails. Everywhere else a kernel must compile and fit."""


class Arch(NamedTuple):
    """What a processor holds: the limits that the gates and the occupancy come from."""

    target: GPUTarget
    block_shared: int  # KiB one block may use
    shared: int  # KiB of the whole processor
    warps: int
    blocks: int
    tensor: str  # the tensor-core instruction of a tile of 64 rows or more


CHIPS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 163, 164, 64, 32, "mma.sync"),
    "sm_89": Arch(GPUTarget("cuda", 89, 32), 99, 100, 48, 24, "mma.sync"),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 227, 228, 64, 32, "wgmma"),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 227, 228, 64, 32, "tcgen05"),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 64, 64, 32, 16, "mfma"),
}
TENSOR = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "mfma": r"v_mfma"}
TMA = r"cp\.async\.bulk\.tensor"
TMEM_COLUMNS = 512
ROUNDED = ("shrink", "dy", "x", "group_shrink", "group_dy", "group_x", "glu", "multi_shrink", "multi_outer")
"""Kernels whose fp32 results must not err more than plain fp32's."""


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case. spills, shared: bytes.   tmem: columns.   warps: resident on a processor."""

    registers: int
    spills: int
    shared: int
    tmem: int
    warps: int
    instruction: str
    narrow: int  # load instructions of less than eight bytes
    scratch: int = 0  # bytes of global memory: what a descriptor made on the device would need
    running: int = 0  # products whose accumulator a loop carries on: tensor cores truncate as they add to it
    verdict: str = ""


class _Recorder:
    """A driver that is asked where to launch, and never launches."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, _: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.arch].target


def recorded(case: Case) -> tuple[Any, dict[str, Any]]:
    """(kernel, what Triton would compile) of the first launch that the case's launcher makes."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        launches.append((fn.jit_function, compile))
        return True  # compiled already, as far as the launch needs to know

    driver.set_active(_Recorder(case.arch))
    knobs.runtime.jit_cache_hook = record
    case.launch()
    return launches[-1 if case.kernel == "route" else 0]


def compiled(case: Case) -> Row:
    """Compile one case, past every cache, and judge it."""
    if fastlora_kernels.INTERPRET:
        raise RuntimeError("the audit compiles: run it without TRITON_INTERPRET")
    kernel, launch = recorded(case)
    source = ASTSource(kernel, launch["signature"], launch["constants"], launch["configs"][0])
    options = {name: launch[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = triton.compile(source, target=CHIPS[case.arch].target, options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        reason = " ".join(str(error).split())[-200:]
        return Row(0, 0, 0, 0, 0, "none", 0, 0, 0, f"FAIL does not compile: {type(error).__name__} {reason}")
    row = _measured(case, binary.asm, binary.metadata, log.getvalue())
    return Row(**{**asdict(row), "verdict": "; ".join(failures(case, row)) or "pass"})


def _measured(case: Case, asm: dict[str, str], metadata: Any, log: str) -> Row:
    chip, text = CHIPS[case.arch], asm.get("ptx") or asm["amdgcn"]
    if chip.target.backend == "cuda":
        registers, spills = _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes spill stores", log)
    else:
        registers, spills = _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text) * 4
    tmem = getattr(metadata, "tmem_size", 0) or 0
    per_block = metadata.num_warps  # the tile's, and those that specialisation adds
    blocks = min(chip.blocks, chip.warps // per_block, _warps_by_registers(chip, registers) // per_block)
    if metadata.shared:
        reserved = 1024 if chip.target.backend == "cuda" else 0
        blocks = min(blocks, chip.shared * 1024 // (metadata.shared + reserved))
    if tmem:
        blocks = min(blocks, TMEM_COLUMNS // tmem)
    found = [name for name, pattern in TENSOR.items() if re.search(pattern, text)]
    found += ["tma"] * bool(re.search(TMA, text)) + ["specialized"] * (per_block > case.tile.num_warps)
    narrow = sum(width < 8 for width in _load_widths(text))
    scratch = getattr(metadata, "global_scratch_size", 0)
    warps, running = blocks * per_block, _running(asm["ttgir"])
    return Row(registers, spills, metadata.shared, tmem, warps, "+".join(found) or "none", narrow, scratch, running)


def _running(ttgir: str) -> int:
    """How many products add to what a loop carries. (Those in tensor memory, tcgen05, are not looked at.)"""
    carried = {name for args in re.findall(r"iter_args\((.*?)\) ->", ttgir) for name in re.findall(r"(%\w+) =", args)}
    products = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) %[\w#]+, %[\w#]+, (%\w+)", ttgir)
    return sum(acc in carried for acc in products)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise LookupError(f"the compiler's output has no {pattern!r}")
    return int(found[1])


def _warps_by_registers(chip: Arch, registers: int) -> int:
    """Four schedulers, each with its own registers, given out to a warp in units of eight a lane."""
    lane = -(-max(registers, 1) // 8) * 8
    return 4 * (512 // lane)


def _load_widths(ptx: str) -> list[int]:
    """Bytes of every global load and asynchronous copy in PTX; AMD's assembly has none of these."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], 0x([0-9a-f]+)", ptx)
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in loads] + [int(size, 16) for size in copies]


def failures(case: Case, row: Row) -> list[str]:
    """The gates that the row does not pass."""
    chip = CHIPS[case.arch]
    found = []
    if row.shared > chip.block_shared * 1024:
        found.append(f"FAIL shared memory: {row.shared / 1024:.0f} of {chip.block_shared} KiB")
    if row.tmem > TMEM_COLUMNS:
        found.append(f"FAIL tensor memory: {row.tmem} of {TMEM_COLUMNS} columns")
    if case.arch in GATED and row.spills:
        found.append(f"FAIL spills: {row.spills} bytes")
    if case.kernel in ("expand", "dx", "group_dx") and case.main != "fp32":
        wanted = chip.tensor if case.tile.BLOCK_M >= 64 or chip.tensor == "mfma" else "mma.sync"
        if wanted not in row.instruction.split("+"):
            found.append(f"FAIL instruction: {row.instruction}, not {wanted}")
        for asked, name in ((case.tile.tma, "tma"), (case.tile.specialize, "specialized")):
            if asked and name not in row.instruction.split("+"):
                found.append(f"FAIL instruction: {row.instruction}, not {name}")
    if row.running and case.kernel in ROUNDED:
        found.append(f"FAIL sums: {row.running} run on in tensor cores")
    if row.scratch:
        found.append(f"FAIL scratch: {row.scratch} bytes of global memory")
    if case.arch in GATED and row.narrow and _fills_wide_loads(case):
        found.append(f"FAIL loads: {row.narrow} of less than eight bytes")
    return found


def _fills_wide_loads(case: Case) -> bool:
    """Whether each thread of a thin kernel gets eight bytes of both operands, so that a narrow load is a loss."""
    kernel = case.kernel.removeprefix("group_")
    if kernel not in ("shrink", "dy", "x") or case.main == "fp32":  # fp32 tiles are transposed element by element
        return False
    step = case.tile.BLOCK_M if kernel == "x" else case.tile.BLOCK_K
    factor = min(case.rank, 128) * step * (2 if case.adapter != "fp32" and kernel != "x" else 4)
    return factor >= 8 * 32 * case.tile.num_warps


def stamp() -> str:
    """A hash of what decides a compilation: the kernels' code without its prose, and the tiles of the tables."""
    source = hashlib.sha256()
    package = Path(fastlora_kernels.__file__).parent
    for path in sorted(package.glob("*.py")):
        if path.name not in (
            "__init__.py",
            "group.py",
            "jobs.py",
            "linear.py",
            "overlap.py",
            "traffic.py",
        ):  # they launch nothing of their own
            source.update("\n".join([path.name, *_code(path.read_text())]).encode())
    for arch in ARCHS:
        tiles = {
            kernel: [{name: value for name, value in row.items() if name != "source"} for row in rows]
            for kernel, rows in table(arch)["tiles"].items()
        }
        source.update(json.dumps([arch, tiles], sort_keys=True).encode())
    return source.hexdigest()[:16]


def _code(text: str) -> list[str]:
    """The lines of a module that are code."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = ((number, line.rstrip()) for number, line in enumerate(text.splitlines(), 1) if number not in prose)
    return [line for _, line in lines if line.strip() and not line.lstrip().startswith("#")]


def read(path: Path = TABLE) -> tuple[str, dict[tuple[str, ...], Row]]:
    """(stamp, rows by case) of a checked-in table."""
    with path.open(newline="") as file:
        stamped = file.readline().split()[-1]
        rows = {}
        for line in csv.DictReader(file):
            key = tuple(line.pop(name) for name in KEY)
            numbers = [int(line[f.name]) if f.type == "int" else line[f.name] for f in fields(Row)]
            rows[key] = Row(*numbers)  # type: ignore[arg-type]
    return stamped, rows


def write(rows: dict[tuple[str, ...], Row], path: Path = TABLE) -> None:
    """Check a table in: its stamp, the header, one case a line."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# written by python -m benchmarks.audit --write; kernels and tiles {stamp()}\n")
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*KEY, *(f.name for f in fields(Row))])
        lines.writerows([*key, *asdict(row).values()] for key, row in rows.items())


def sweep(wanted: Iterable[Case], jobs: int = 2) -> dict[tuple[str, ...], Row]:
    """Compile the cases in `jobs` processes."""
    todo = list(wanted)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done: dict[tuple[str, ...], Row] = {}
        for case, row in zip(todo, pool.map(compiled, todo, chunksize=4), strict=True):
            done[case.key] = row
            if sys.stderr.isatty():
                print(f"\r{len(done)} of {len(todo)}", end="", file=sys.stderr)
    return done


def summary(rows: dict[tuple[str, ...], Row]) -> str:
    """The worst of each kernel on each architecture, and every line that fails."""
    lines = [f"{'':8}{'':8}{'cases':>6}{'registers':>11}{'spills':>8}{'shared':>9}{'warps':>7}  instructions"]
    for arch, kernel in dict.fromkeys(key[:2] for key in rows):
        of = [row for key, row in rows.items() if key[:2] == (arch, kernel)]
        lines.append(
            f"{arch:8}{kernel:8}{len(of):6}{max(r.registers for r in of):11}{max(r.spills for r in of):8}"
            f"{max(r.shared for r in of) / 1024:5.0f} KiB{min(r.warps for r in of):7}  "
            + ", ".join(sorted({r.instruction for r in of}))
        )
    failing = [f"{' '.join(key)}: {row.verdict}" for key, row in rows.items() if row.verdict != "pass"]
    return "\n".join([*lines, "", *failing, f"{len(rows) - len(failing)} of {len(rows)} pass"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHS)
    parser.add_argument("--kernel", nargs="+", choices=tuple(AXES))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}; compiles everything")
    parser.add_argument("--check", action="store_true", help=f"compare with {TABLE.name}")
    args = parser.parse_args()
    if args.write and (args.arch or args.kernel):
        parser.error("--write compiles everything, wanted it without --arch and --kernel")
    rows = sweep(cases(tuple(args.arch or ARCHS), tuple(args.kernel or AXES)), args.jobs)
    print(summary(rows))
    good = all(row.verdict == "pass" for row in rows.values())
    if args.write:
        write(rows)
    if args.check:
        _, table_rows = read()
        changed = [key for key, row in rows.items() if table_rows.get(key) != row]
        print(*(f"{' '.join(key)}: {table_rows.get(key)} → {rows[key]}" for key in changed), sep="\n")
        good = good and not changed
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
