"""The traffic model reproduces the design's floors, and counts what each flag takes away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastlora_kernels.traffic import JobsLayer, Layer, Work

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


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="which: got 'sideways', wanted one of"):
        TYPICAL.lora("sideways")
