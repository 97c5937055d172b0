"""How work is cut and which tile it gets: functions of shape alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlora_kernels as kernels
from fastlora_kernels.dot import pieces
from fastlora_kernels.dy_pass import bands, dh_parts, dy_bands
from fastlora_kernels.shrink import block_r, chunks
from fastlora_kernels.tables import table

sizes = st.integers(0, 22).flatmap(lambda bits: st.integers(2**bits // 2 + 1, 2**bits))  # as many small as large
blocks = st.sampled_from([16, 32, 64, 128])
ranks = st.integers(1, 512)
many = settings(max_examples=500)
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16


def assert_tiles_the_axis(axis: int, count: int, size: int, block: int) -> None:
    """`count` pieces of `size` cover the axis, none is empty, and each begins at a multiple of the block."""
    assert count >= 1 and size % block == 0
    assert (count - 1) * size < axis <= count * size


@many
@given(long=sizes, programs=st.integers(0, 10**6), block=blocks, least=st.sampled_from([512, 1280, 20480]))
def test_chunks(long: int, programs: int, block: int, least: int) -> None:
    count, size = chunks(long, programs, block, least)
    assert_tiles_the_axis(long, count, size, block)
    assert count == 1 or (count * programs <= 256 and size >= least)


@many
@given(M=sizes, R=ranks, block=blocks, most=st.integers(1, 4096))
def test_bands(M: int, R: int, block: int, most: int) -> None:
    count, rows = bands(M, R, block, most)
    assert_tiles_the_axis(M, count, rows, block)
    assert count == 1 or count * 40 * R <= M
    assert rows <= max(80 * R, most) + block


@many
@given(M=sizes, Ns=st.lists(sizes, min_size=1, max_size=3), R=st.integers(1, 64), block_m=blocks, block_k=blocks)
def test_partials_of_the_dy_pass_stay_under_a_tenth_of_the_dys(
    M: int, Ns: list[int], R: int, block_m: int, block_k: int
) -> None:
    Rs, members = [R] * len(Ns), len(Ns)
    n_bands, rows = dy_bands(M, max(Ns), R, block_m)
    n_parts = dh_parts(M, Ns, Rs, n_bands * (rows // block_m) * -(-R // block_r(R)) * members, block_k)
    partials = 4 * R * ((M * n_parts * members if n_parts > 1 else 0) + (sum(Ns) * n_bands if n_bands > 1 else 0))
    assert partials <= 0.1 * 2 * M * sum(Ns)


@given(ranks, st.integers(1, 3))
def test_rank_blocks(R: int, members: int) -> None:
    block, most = block_r(R, members), 128 if members == 1 else 64
    assert block in (16, 32, 64, 128)
    assert (block >= R or block == most) and (block < 2 * R or block == 16)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_a_second_mask_halves_the_tile_of_a_groups_dx(arch: str) -> None:
    if any(row["source"] == "measured" for row in table(arch)["tiles"]["group_dx"]):
        pytest.skip("a GPU's clock has chosen; whether a tile spills is the audit's to say")
    for tma in (True, False):
        one, two = (kernels.tile("group_dx", arch, bf16, 8192, 4096, 16, tma, masks) for masks in (1, 2))
        assert one.BLOCK_M * one.BLOCK_N == 2 * two.BLOCK_M * two.BLOCK_N and one.tma == two.tma == tma


@pytest.mark.parametrize(
    ("main", "factor", "out", "counts"),
    [
        (bf16, bf16, bf16, (0, 0, 0)),  # equal 16-bit operands: native
        (fp16, fp16, fp32, (0, 0, 0)),
        (bf16, fp32, bf16, (2, 2, 2)),  # a 16-bit result hears nothing of the third
        (fp32, fp32, fp16, (2, 2, 2)),
        (bf16, fp32, fp32, (3, 2, 1)),
        (fp32, fp32, fp32, (3, 2, 1)),
        (fp32, bf16, fp32, (3, 2, 1)),
    ],
)
def test_pieces(main: torch.dtype, factor: torch.dtype, out: torch.dtype, counts: tuple[int, int, int]) -> None:
    for precision, count in zip(("highest", "high", "medium"), counts, strict=True):
        assert pieces(main, (factor,), out, precision) == count


TABLES = sorted(Path(inspect.getfile(kernels)).with_name("tables").glob("*.json"))
GROUPS = ["group_shrink", "group_dy", "group_x", "group_dx", "group_add"]
MANY = ["multi_shrink", "multi_expand", "multi_linear", "multi_outer"]
KERNELS = ["shrink", "expand", "add", "dy", "x", "dx", *GROUPS, "glu", "glu_backward", *MANY]
BOUNDS = {"max_M", "max_N", "max_K", "max_R", "max_masks", "dtype"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_answer_every_shape(path: Path) -> None:
    """Each row says where it comes from, the last of each list has no bounds, and a tile is a valid launch."""
    table = json.loads(path.read_text())
    assert set(table["tiles"]) == set(KERNELS)
    for rows in (*table["tiles"].values(), table["strategy"]):
        assert all(row["source"] in ("predicted", "measured") for row in rows)
        assert all(row["why"] for row in table["strategy"])
        assert not BOUNDS & set(rows[-1])
    for kernel, rows in table["tiles"].items():
        least = 1 if kernel in ("glu", "glu_backward") else 16  # no matmul there
        for row in rows:
            tile = kernels.Tile(**row["tile"])
            assert all(size >= least and size & (size - 1) == 0 for size in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K))
            assert tile.tma or not tile.specialize, "only the persistent form has warps for loads alone"
    for kernel, rows in table["tiles"].items():
        assert kernel in ("expand", "dx", "group_dx") or not any("tma" in row["tile"] for row in rows)
    assert {row["strategy"] for row in table["strategy"]} <= {"fused", "split"}


@given(
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from([fp32, fp16, bf16]),
    arch=st.sampled_from([*(path.stem for path in TABLES), "sm_999", "gfx000"]),
    M=sizes,
    N=sizes,
    R=ranks,
    masks=st.integers(0, 3),
)
def test_every_shape_on_every_architecture_has_a_tile(
    kernel: str, dtype: torch.dtype, arch: str, M: int, N: int, R: int, masks: int
) -> None:
    tile = kernels.tile(kernel, arch, dtype, M, N, R, masks=masks)
    assert tile == kernels.tile(kernel, arch, dtype, M, N, R, masks=masks)
    assert not kernels.tile(kernel, arch, dtype, M, N, R, tma=False, masks=masks).tma
    assert set(tile.options) == {"num_warps", "num_stages"}
    how, why = kernels.strategy(arch, dtype, M, N, N, R)
    assert how in ("fused", "split")
    assert why.startswith(f"table {arch if arch in {path.stem for path in TABLES} else 'default'}, ")


@given(M=sizes, N=sizes, R=ranks)
def test_an_unknown_gpu_gets_the_defaults(M: int, N: int, R: int) -> None:
    assert kernels.tile("expand", "sm_999", bf16, M, N, R) == kernels.tile("expand", "default", bf16, M, N, R)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", ["expand", "dx", "group_dx"])
def test_large_16_bit_gemms_take_descriptors_from_hopper_on(kernel: str, arch: str) -> None:
    assert not kernels.tile(kernel, arch, fp32, 8192, 4096, 16).tma
    if any(row["source"] == "measured" for row in table(arch)["tiles"][kernel]):
        pytest.skip("a GPU's clock has chosen")
    for dtype in (fp16, bf16):
        assert kernels.tile(kernel, arch, dtype, 513, 4096, 16).tma
        assert not kernels.tile(kernel, arch, dtype, 512, 4096, 16).tma
        assert not kernels.tile(kernel, "sm_80", dtype, 8192, 4096, 16).tma
