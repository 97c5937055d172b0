"""The traffic model reproduces the design's floors, and counts what each flag takes away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastlora_kernels.traffic import Gated, Group, JobsLayer, Layer, Work

TYPICAL = Layer(M=8192, K=4096, N=4096, R=16)
MIB = 2**20


def elements(M: int, K: int, N: int, *, mk: int, mn: int, nk: int) -> int:
    return mk * M * K + mn * M * N + nk * N * K


def test_the_floor_of_forward_and_backward() -> None:
    assert TYPICAL.lora("both").bytes == pytest.approx(512 * MIB, rel=0.01)
    small = Layer(M=512, K=1024, N=3072, R=1, main=4)
    assert small.lora("both").bytes == pytest.approx(4 * elements(512, 1024, 3072, mk=4, mn=3, nk=2), rel=0.01)


def test_the_frozen_layer_moves_each_tensor_once() -> None:
    assert TYPICAL.frozen("forward").bytes == 2 * elements(8192, 4096, 4096, mk=1, mn=1, nk=1)
    assert TYPICAL.frozen("both") == TYPICAL.frozen("forward") + TYPICAL.frozen("backward")


def test_extra_bytes_over_the_frozen_layer() -> None:
    forward = TYPICAL.lora("forward").bytes - TYPICAL.frozen("forward").bytes
    assert forward == pytest.approx(2 * 8192 * 4096, rel=0.05)
    both = TYPICAL.lora("both").bytes - TYPICAL.frozen("both").bytes
    assert both == pytest.approx((4 + 2) * 8192 * 4096, rel=0.05)


def test_split_reads_and_writes_each_output_once_more() -> None:
    split = replace(TYPICAL, fused=False)
    assert split.lora("forward").bytes - TYPICAL.lora("forward").bytes == 2 * 2 * 8192 * 4096
    assert split.lora("both").flops == TYPICAL.lora("both").flops


def test_gradients_that_nobody_wants_cost_nothing() -> None:
    nothing = replace(TYPICAL, want_dx=False, want_da=False, want_db=False)
    assert nothing.lora("backward") == Work()
    adapters = replace(TYPICAL, want_dx=False)
    assert adapters.lora("backward").bytes == pytest.approx(2 * 2 * 8192 * 4096, rel=0.05)


def test_the_low_rank_term_is_about_one_percent_of_the_arithmetic() -> None:
    assert TYPICAL.lora("both").flops / TYPICAL.frozen("both").flops == pytest.approx(1.01, abs=0.005)


def test_jobs_pay_for_their_own_rank_and_rows() -> None:
    """One job is a layer by itself, split, but for dy, which two launches read; a rank 4 job beside a rank 64 one costs
    a sixteenth; rows of nobody cost the base alone."""
    M, K, N = 512, 4096, 1024
    one = JobsLayer((M,), (16,), K, N)
    alone = Layer(M, K, N, 16, adapter=4, fused=False)
    again = M * N * 2
    assert one.lora("both").bytes == pytest.approx(alone.lora("both").bytes + again, rel=1e-6)
    assert one.lora("both").flops == alone.lora("both").flops
    few, many = (JobsLayer((M,), (R,), K, N).shrink().flops for R in (4, 64))
    assert 16 * few == many and JobsLayer((M, M), (4, 64), K, N).shrink().flops == few + many
    beside = replace(one, base_rows=100)
    extra = Layer(M + 100, K, N, 1).frozen("both").flops - Layer(M, K, N, 1).frozen("both").flops
    assert beside.lora("both").flops - one.lora("both").flops == extra


def test_the_roof_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Work(1000, 10).seconds(rate=100, bandwidth=10) == 10
    assert Work(1000, 1000).seconds(rate=100, bandwidth=10) == 100


def test_between_the_layers_of_a_gated_mlp() -> None:
    """One writing of z, no reading of it for down's shrink; backward moves six tensors as wide as the MLP."""
    gated, wide = Gated(M=8192, width=14336, R=16), 2 * 8192 * 14336
    down = Layer(M=8192, K=14336, N=4096, R=16)
    assert gated.glu().bytes == 3 * wide + down.shrink().bytes - wide and gated.glu().flops == down.shrink().flops
    assert Gated(M=8192, width=14336, R=0).glu() == Work(0, 3 * wide)
    assert gated.backward() == Work(0, 6 * wide) and gated.backward(want_z=False) == Work(0, 5 * wide)


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="which: got 'sideways', wanted one of"):
        TYPICAL.lora("sideways")


def qkv(**changed: bool) -> Group:
    """q, k and v of Llama-3-8B."""
    return Group(tuple(replace(TYPICAL, N=N, **changed) for N in (4096, 1024, 1024)))


def test_a_group_reads_x_once_for_its_shrinks_and_once_for_its_das() -> None:
    alone = [replace(TYPICAL, N=N) for N in (4096, 1024, 1024)]
    x = 2 * 8192 * 4096
    for pass_, saved in (("shrink", 2 * x), ("x", 2 * x), ("dx", 2 * x), ("dy", 0), ("expand", 0)):
        group, layers = getattr(qkv(), pass_)(), sum((getattr(m, pass_)() for m in alone), Work())
        assert (group.flops, group.bytes) == (layers.flops, layers.bytes - saved), pass_


def test_the_floor_of_a_group() -> None:
    """4 + (members) readings and writings of x and dx, 3 of each dy, 2 of each w."""
    wanted = 2 * (elements(8192, 4096, 6144, mk=0, mn=3, nk=2) + (1 + 3 + 1 + 1) * 8192 * 4096)
    assert qkv().lora("both").bytes == pytest.approx(wanted, rel=0.015)


def test_a_group_of_one_is_its_layer() -> None:
    for fused in (True, False):
        one = Group((replace(TYPICAL, fused=fused),), fused)
        for which in ("forward", "backward", "both"):
            assert one.lora(which) == replace(TYPICAL, fused=fused).lora(which)
            assert one.frozen(which) == TYPICAL.frozen(which)


def test_split_adds_the_dxs_up_one_by_one() -> None:
    """Two more readings and writings of dx between the three GEMMs, then one for the update; and one a y."""
    x, ys = 2 * 8192 * 4096, 2 * 8192 * 6144
    assert replace(qkv(), fused=False).lora("both").bytes - qkv().lora("both").bytes == 2 * 2 * x + 2 * x + 2 * ys


def test_members_without_an_adapter_and_gradients_that_nobody_wants() -> None:
    bare = Group(tuple(replace(m, R=0) for m in qkv().members))
    assert bare.lora("forward") == bare.frozen("forward") and bare.shrink() == bare.x() == bare.dy() == Work()
    nothing = qkv(want_dx=False, want_da=False, want_db=False)
    assert nothing.lora("backward") == Work() == nothing.frozen("backward")
    assert replace(nothing, fused=False).lora("backward") == Work()
