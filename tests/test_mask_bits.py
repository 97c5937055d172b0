"""The masks that the x pass leaves for dx, a bit an element: those of the seeds, and dx's own to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped import assert_all_same, backward, group
from launches import watch
from operands import SCALE, Layer, a_seed, fp32, layer
from tolerance import assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import reference
from fastlora_kernels import Tile
from fastlora_kernels.dropout import bits_for, empty_bits

pytestmark = pytest.mark.usefixtures("poison")

PS = (0.4, 0.0, 0.2)
WANTS = [[True, False, False], [False, True, True], [False, False, False]]
"""Of which members da is wanted: of some that drop, or of none."""
TILES = [Tile(16, 16, 16), Tile(32, 64, 32), Tile(64, 32, 256, num_stages=2), Tile(128, 128, 64, num_stages=2)]


def unpacked(bits: Tensor, K: int) -> Tensor:
    """[M, ⌈K/128⌉·16] bytes as the [M, K] mask they hold."""
    return ((bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1).bool().flatten(1)[:, :K]


@pytest.mark.parametrize("config", TILES, ids=lambda t: f"{t.BLOCK_M}x{t.BLOCK_K}")
@pytest.mark.parametrize("R", [7, 150])  # 150 ranks are three blocks of a group's: the first of them leaves the masks
def test_the_x_pass_leaves_the_masks_of_the_seeds(R: int, config: Tile, device: str) -> None:
    M, K = 139, 75
    x, dhs = torch.randn(M, K, device=device), [torch.randn(M, R, device=device) for _ in PS]
    seeds = torch.tensor([1, 2, -3], device=device)
    bits = empty_bits(3, x).fill_(0xA5)
    args: Any = x, dhs, [fp32] * 3
    das = kernels.group_x_pass(*args, ps=PS, seeds=seeds, bits=bits, config=config)
    assert_all_same(das, kernels.group_x_pass(*args, ps=PS, seeds=seeds, config=config))
    for i, p in enumerate(PS):
        if p:
            assert_same(unpacked(bits[i], K), reference.dropout_mask(seeds[i], M, K, p))
        else:
            assert bool((bits[i] == 0xA5).all()), "nobody drops here"


@pytest.mark.parametrize("K", [72, 75, 264])
@pytest.mark.parametrize("config", [*TILES, Tile(32, 64, 64, tma=True), Tile(32, 256, 64, tma=True)], ids=str)
def test_dx_has_the_same_bits(config: Tile, K: int, device: str) -> None:
    """In either form, with one mask or several, in a GEMM and alone."""
    M, N = 70, 40
    t, seeds = layer("bf16+fp32", 7, device, M, K, N), torch.tensor([5, 6, 7], device=device)
    bits, one = empty_bits(3, t.x), empty_bits(1, t.x)
    kernels.group_x_pass(t.x, [t.dh] * 3, [fp32] * 3, ps=PS, seeds=seeds, bits=bits)
    kernels.x_pass(t.x, t.dh, fp32, p=0.4, seed=seeds[0], bits=one)
    single: Any = t.dy, t.w, t.dh, t.a
    assert_same(
        kernels.dx(*single, p=0.4, bits=one, config=config), kernels.dx(*single, p=0.4, seed=seeds[0], config=config)
    )
    members: Any = [t.dy] * 3, [t.w] * 3, [t.dh] * 3, [t.a] * 3
    assert_same(
        kernels.group_dx(*members, ps=PS, bits=bits, config=config),
        kernels.group_dx(*members, ps=PS, seeds=seeds, config=config),
    )
    assert_same(
        kernels.group_low_rank_dx(*members[2:], fp32, ps=PS, bits=bits, config=config),
        kernels.group_low_rank_dx(*members[2:], fp32, ps=PS, seeds=seeds, config=config),
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    watch(monkeypatch, names.append)
    return names


def grads(t: Layer, seed: Tensor, how: str, want_da: bool = True) -> Any:
    return kernels.lora_backward(
        t.dy, t.x, t.w, t.a, t.b, t.h, seed, SCALE, 0.3, True, want_da, True, how
    )  # fmt: skip


@pytest.mark.parametrize("how", ["fused", "split"])
def test_backward_draws_a_mask_once(
    how: str, launched: list[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """da first, then dx from what it left: to the bit what each draws for itself, as where nobody wants da."""
    t, seed, g = layer("bf16+fp32", 7, device), a_seed(device), group("bf16+fp32", (7, 16, 3), device)
    alone, together = grads(t, seed, how), backward(g, how)
    assert launched == ["dy", "x", "expand"] * 2
    some = [backward(g, how, want=(True, das, True)) for das in WANTS]
    launched.clear()
    for home in ("linear", "group"):
        monkeypatch.setattr(f"fastlora_kernels.{home}.bits_for", lambda *_: None)
    assert_all_same(grads(t, seed, how), alone)
    assert_all_same(backward(g, how), together)
    assert launched == ["dy", "expand", "x"] * 2
    assert_all_same(some, [backward(g, how, want=(True, das, True)) for das in WANTS])
    launched.clear()
    assert_same(grads(t, seed, how, want_da=False)[0], alone[0])
    assert launched == ["dy", "expand"]


def test_dx_draws_for_itself_what_the_x_pass_does_not() -> None:
    x = torch.empty(5, 130)
    assert bits_for(x, [False, False], [True, True]) is None
    assert bits_for(x, [True, True], [True, False]) is None
    place = bits_for(x, [True, False], [True, False])
    assert place is not None and place.shape == (2, 5, 32) and place.dtype == torch.uint8
