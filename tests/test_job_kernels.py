"""Jobs that share a batch on the kernels: every launcher and the whole op beside its twin, plain torch and float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from operands import MIXES, double, lay
from plain import lora_linear as plain_lora_linear
from tolerance import assert_close, assert_same
from torch import Tensor

import fastlora_kernels as kernels
from fastlora import eager, functional, reference
from fastlora_kernels import Drops, Routes, Tile
from fastlora_kernels.jobs import pool_of
from fastlora_kernels.multi_outer import BAND
from fastlora_kernels.tables import table

RANKS = (4, 7, 16, 40)
MIXED = [2, 0, -1, 1, 2, 3, 0, 2]
PS = (0.1, 0.0, 0.05, 0.5)
SCALES = (1.7, 0.5, 2.0, 0.25)
MAIN = ("fp32", "fp16", "bf16", "bf16+fp32")


@dataclass(frozen=True)
class Layer:
    """One frozen layer and the factors of each job; the second and the last have a lora_bias."""

    x: Tensor
    w: Tensor
    bias: Tensor
    as_: list[Tensor]
    bs: list[Tensor]
    lora_biases: list[Tensor | None]
    dy: Tensor
    jobs: list[int]
    seeds: Tensor

    def double(self) -> Layer:
        lists = {name: [double(t) for t in getattr(self, name)] for name in ("as_", "bs", "lora_biases")}
        return replace(self, **{name: double(getattr(self, name)) for name in ("x", "w", "bias", "dy")}, **lists)

    def part(self, requests: Sequence[int]) -> Layer:
        """Some requests of the batch, as a batch."""
        share = len(self.x) // len(self.jobs)
        rows = torch.tensor([r * share + i for r in requests for i in range(share)], device=self.x.device)
        return replace(self, x=self.x[rows], dy=self.dy[rows], jobs=[self.jobs[r] for r in requests])


def layer(
    jobs: Sequence[int], mix: str = "fp32", device: str = "cpu", share: int = 5, K: int = 70, N: int = 51,
    ranks: Sequence[int] = RANKS,
) -> Layer:  # fmt: skip
    main, a, b = MIXES[mix]

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return lay((torch.randn(shape) * std).to(device, dtype))

    M = len(jobs) * share
    return Layer(
        normal(M, K, dtype=main), normal(N, K, dtype=main, std=K**-0.5), normal(N, dtype=main),
        [normal(r, K, dtype=a, std=K**-0.5) for r in ranks], [normal(N, r, dtype=b, std=r**-0.5) for r in ranks],
        [normal(N, dtype=b) if j % 2 else None for j in range(len(ranks))],
        normal(M, N, dtype=main), list(jobs), torch.randint(-(2**63), 2**63 - 1, (len(ranks),), device=device),
    )  # fmt: skip


def launched(t: Layer, ps: Sequence[float] = PS, module: Any = kernels) -> dict[str, Tensor]:
    """y, dx, and da, db as pools, by the launchers of the whole op."""
    factors = t.seeds, t.jobs, SCALES[: len(t.as_)], ps[: len(t.as_)]
    y, h = module.jobs_linear(t.x, t.w, t.bias, t.as_, t.bs, t.lora_biases, *factors)
    biased = [bias is not None for bias in t.lora_biases]
    dx, da, db = module.jobs_backward(t.dy, t.x, t.w, t.as_, t.bs, biased, h, *factors, True, True, True)
    return {"y": y, "dx": dx, "da": da, "db": db}


def autograd(t: Layer, one: Any, ps: Sequence[float] = PS) -> dict[str, Tensor]:
    """The same by autograd: each job trained alone on its own rows by `one`, which takes lora_linear's arguments."""
    share = len(t.x) // len(t.jobs)
    owner = torch.tensor(t.jobs, device=t.x.device).repeat_interleave(share)
    y = torch.nn.functional.linear(t.x, t.w, t.bias)
    dx = t.dy @ t.w
    das, dbs = [], []
    for j, (a, b, lora_bias) in enumerate(zip(t.as_, t.bs, t.lora_biases, strict=True)):
        rows = owner == j
        leaves = [t.x[rows], a, b, *([] if lora_bias is None else [lora_bias])]
        x, a, b, *rest = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        mine = one(
            x, t.w, t.bias, a, b, SCALES[j], dropout_p=ps[j], seed=t.seeds[j], lora_bias=rest[0] if rest else None
        )
        grads = torch.autograd.grad(mine, [x, a, b, *rest], t.dy[rows])
        y[rows], dx[rows] = mine.detach(), grads[0]
        das.append(grads[1])
        dbs += [grads[2].reshape(a.shape[0], -1), *(g[None] for g in grads[3:])]  # [N, R]'s elements, rows of N
    return {"y": y, "dx": dx, "da": torch.cat(das), "db": torch.cat(dbs)}


@pytest.mark.parametrize("mix", MAIN)
def test_the_whole_layer(mix: str, device: str, poison: None) -> None:
    """Forward and every gradient, with four dropouts at once, against each job alone in float64."""
    t = layer(MIXED, mix, device)
    ours = launched(t)
    usual, exact = autograd(t, plain_lora_linear), autograd(t.double(), reference.lora_linear)
    for what, found in ours.items():
        assert_close(found, usual[what], exact[what], f"{mix} {what}")


@pytest.mark.parametrize("mix", MAIN)
@pytest.mark.parametrize(("share", "K"), [(5, 70), (90, 1100)])
def test_the_whole_layer_on_torch(share: int, K: int, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a CPU, under its own masks; of few and of many outputs, which run otherwise."""
    monkeypatch.setattr(
        reference, "dropout_mask", lambda seed, M, K, p: eager.drop(torch.ones(M, K), seed, p, torch.float32) > 0
    )
    t = layer(MIXED, mix, share=share, K=K)
    ours = launched(t, module=eager)
    usual, exact = autograd(t, plain_lora_linear), autograd(t.double(), reference.lora_linear)
    for what, found in ours.items():
        assert_close(found, usual[what], exact[what], f"{mix} {what}")


def test_the_twin_is_each_job_alone() -> None:
    """reference.jobs_linear, which tests elsewhere lean on, against autograd of each job's own rows."""
    t = layer(MIXED).double()
    leaves = [t.x, *t.as_, *t.bs]
    for leaf in leaves:
        leaf.requires_grad_()
    y = reference.jobs_linear(
        t.x, t.w, t.bias, t.as_, t.bs, SCALES, t.jobs, dropout_p=PS, lora_biases=t.lora_biases, seeds=t.seeds
    )
    dx, *rest = torch.autograd.grad(y, leaves, t.dy)
    wanted = autograd(t, reference.lora_linear)
    torch.testing.assert_close(y, wanted["y"])
    torch.testing.assert_close(dx, wanted["dx"])
    torch.testing.assert_close(torch.cat(rest[: len(RANKS)]), wanted["da"])


def test_many_rows_are_summed_in_bands(device: str, poison: None) -> None:
    """A job of more rows than a band beside one of few: partial sums, in an order of their own, of no one else."""
    sizes, slots = (2 * BAND + 10, 30), torch.tensor([1] * 7 + [0] * (2 * BAND + 10) + [1] * 23, dtype=torch.int32)
    slots = slots.to(device)
    rank, start = (torch.tensor(v, dtype=torch.int32, device=device) for v in ((7, 4), (0, 7)))
    none, factor = torch.zeros_like(rank), torch.tensor([0.5, 2.0], device=device)
    x, f = lay(torch.randn(sum(sizes), 33).to(device)), lay(torch.randn(sum(sizes), 16).to(device))

    def run(rows: Tensor) -> Tensor:
        routes = kernels.route(slots[rows], Routes.empty(len(rows), 2, device))
        return kernels.multi_outer(x[rows], f[rows], start, rank, none, factor, 11, routes, torch.float32)

    everyone = torch.arange(len(slots), device=device)
    ours = run(everyone)
    usual = reference.multi_outer(x, f, start, rank, factor, slots, 11)
    exact = reference.multi_outer(x.double(), f.double(), start, rank, factor.double(), slots, 11)
    assert_close(ours, usual, exact)
    assert_same(run(everyone[slots == 1])[7:], ours[7:])


def test_company_changes_no_bit(device: str) -> None:
    """Each job alone, in another order and beside fewer: its rows of y and dx, its da and db, masks and all."""
    t = layer(MIXED, "bf16+fp32", device)
    t = replace(t, w=torch.zeros_like(t.w))  # the base's own sums are the vendor's
    whole, share = launched(t), 5
    ends = torch.tensor([0, *RANKS]).cumsum(0).tolist()
    for j in range(len(RANKS)):
        mine = [r for r, job in enumerate(MIXED) if job == j]
        rows = torch.tensor([r * share + i for r in mine for i in range(share)], device=device)
        alone = launched(t.part(mine))
        assert_same(alone["y"], whole["y"][rows])
        assert_same(alone["dx"], whole["dx"][rows])
        assert_same(alone["da"][ends[j] : ends[j + 1]], whole["da"][ends[j] : ends[j + 1]])
        others = torch.cat([alone["da"][: ends[j]], alone["da"][ends[j + 1] :]])
        assert_same(others, torch.zeros_like(others))
    moved = launched(t.part([2, 6, 0, 5, 1, 3, 4, 7]))  # the third job's first two and the first's two change places
    for name in ("da", "db"):
        rows = slice(ends[3], None) if name == "da" else slice(ends[3] + 1, None)
        assert_same(moved[name][rows], whole[name][rows])


def test_rows_of_others_and_of_nobody_are_not_read(device: str) -> None:
    """NaN in them reaches no gradient; base rows keep the base's bits."""
    t = layer(MIXED, "fp32", device)
    whole = launched(t)
    owner = torch.tensor(t.jobs, device=device).repeat_interleave(5)[:, None]
    spoilt = replace(t, x=t.x.masked_fill(owner != 3, torch.nan), dy=t.dy.masked_fill(owner != 3, torch.nan))
    found, R = launched(spoilt), RANKS[3]
    assert_same(found["da"][-R:], whole["da"][-R:])
    assert_same(found["db"][-R - 1 :], whole["db"][-R - 1 :])
    nobody = owner[:, 0] < 0
    assert_same(whole["y"][nobody], torch.nn.functional.linear(t.x, t.w, t.bias)[nobody])
    assert_same(whole["dx"][nobody], (t.dy @ t.w)[nobody])


def test_strides_and_a_batch_of_nothing(device: str, poison: None) -> None:
    t = layer(MIXED, "fp32", device)
    strided = replace(t, x=lay(t.x.t().contiguous()).t(), dy=lay(t.dy.t().contiguous()).t())
    usual = launched(t)
    for what, found in launched(strided).items():
        torch.testing.assert_close(found, usual[what], rtol=1e-5, atol=1e-5)
    nothing = launched(replace(t, x=t.x[:0], dy=t.dy[:0]))
    assert [tuple(t.shape) for t in nothing.values()] == [(0, 51), (0, 70), (67, 70), (69, 51)]
    assert not nothing["da"].any() and not nothing["db"].any()
    base = launched(replace(t, jobs=[-1] * len(MIXED)))
    assert_same(base["y"], torch.nn.functional.linear(t.x, t.w, t.bias))
    assert not base["da"].any() and not base["db"].any()


def test_pools_are_read_where_they_lie(device: str) -> None:
    """Factors that are rows of one storage are not copied, whichever jobs are there; all others are, rightly."""
    ground = torch.randn(20, 6, device=device)
    a, b, c = ground[2:5], ground[5:6], ground[9:16]
    pool, starts = pool_of([[c], [a]])
    assert pool.untyped_storage().data_ptr() == ground.untyped_storage().data_ptr() and starts == [7, 0]
    assert_same(pool[7:14], c)
    pool, starts = pool_of([[a, b]])
    assert pool.untyped_storage().data_ptr() == ground.untyped_storage().data_ptr() and starts == [0]
    shifted = ground.view(-1)[3:15].view(2, 6)
    for parts in ([[a, c]], [[a], [c.clone()]], [[ground[2:8:2]], [a]], [[a], [shifted]], [[a[:, :5]], [c[:, :5]]]):
        pool, starts = pool_of(parts)
        assert pool.untyped_storage().data_ptr() != ground.untyped_storage().data_ptr()
        for part, start in zip(parts, starts, strict=True):
            assert_same(pool[start : start + sum(map(len, part))], torch.cat(part))


def test_one_launch_each_however_many_jobs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora_kernels import jobs

    calls: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(kernels, name)
        return lambda *args, **options: calls.append(name) or real(*args, **options)

    for name in ("multi_shrink", "multi_expand", "multi_outer"):
        monkeypatch.setattr(jobs, name, counted(name))
    for count in (1, 4):
        calls.clear()
        launched(layer(list(range(count)), "fp32", device, share=2, ranks=RANKS[:count]))
        forward, backward = ["multi_shrink", "multi_expand"], ["multi_outer", "multi_shrink", "multi_outer"]
        assert calls == [*forward, *backward, "multi_expand"]


def test_the_launchers_by_themselves(device: str, poison: None) -> None:
    """multi_shrink with dropout and a factor, multi_expand with dropout, multi_outer: against their twins."""
    t = layer(MIXED, "fp32", device)
    share, G, T = 5, len(RANKS), sum(RANKS)
    slots = torch.tensor(t.jobs, dtype=torch.int32, device=device).repeat_interleave(share)
    routes = kernels.route(slots, Routes.empty(len(slots), G, device))
    start = torch.tensor([0, *RANKS[:-1]], device=device).cumsum(0).int()
    rank = torch.tensor(RANKS, dtype=torch.int32, device=device)
    factor = torch.tensor(SCALES, device=device)
    kept = factor * torch.tensor([reference.dropout_scale(p) for p in PS], device=device)
    thresholds = [reference.dropout_threshold(p) for p in PS]
    drops = Drops(t.seeds, torch.tensor(thresholds, dtype=torch.int32, device=device))
    pool = torch.cat(t.as_)
    config = Tile(16, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, num_stages=1)
    h = kernels.multi_shrink(
        t.x, pool[None], start, rank[None], 40, routes, factor=kept, drops=drops, whole=True, config=config
    )
    y = torch.randn(len(t.x), 70, device=device)
    mine = slots >= 0
    none = torch.zeros_like(rank)
    found = {"expand": lay(y), "shrink": h[0, 0][mine][:, :4]}
    kernels.multi_expand(
        [found["expand"]], h, [pool], start, rank[None], kept[None], none[None], routes, drops=drops, config=config
    )
    found["outer"] = kernels.multi_outer(
        t.x,
        h[0, 0],
        start,
        rank,
        none,
        kept,
        T,
        routes,
        torch.float32,
        drops=drops,
        config=replace(config, BLOCK_M=32),
    )
    for wide in (torch.float32, torch.float64):
        dropped = reference.multi_drop(t.x.to(wide), slots, t.seeds, PS)
        twin_h = reference.multi_shrink(dropped, pool.to(wide)[None], start, rank[None], 40, slots)[0]
        twin_h = twin_h * factor.to(wide)[slots.clamp(min=0).long(), None]
        update = torch.zeros(len(y), 70, dtype=wide, device=device)
        (update,) = reference.multi_expand(
            [update], twin_h[None], [pool.to(wide)], start, rank[None], factor.to(wide)[None], none[None], slots
        )
        twins = {
            "shrink": twin_h[mine][:, :4],
            "expand": (y.to(wide) + reference.multi_drop(update, slots, t.seeds, PS)),
            "outer": reference.multi_outer(dropped, twin_h, start, rank, factor.to(wide), slots, T),
        }
        if wide == torch.float32:
            usual = twins
    for what, t_ in found.items():
        assert_close(t_, usual[what], twins[what], what)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "default", "interpreter"])
def test_tiles_do_not_depend_on_the_batch(arch: str) -> None:
    assert not any("max_M" in row or "M" in row or "max_R" in row for row in table(arch)["tiles"]["multi_outer"])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_ops_pass_opcheck(backend: str, device: str) -> None:
    """On the kernels without base rows and at ranks that fill h: what nobody reads of it stays unwritten."""
    sizes: tuple[Any, ...] = ([1, 0, 0, 1], (16, 16)) if backend == "triton" else ([1, 0, -1, 1], (3, 5))
    t = layer(sizes[0], "fp32", device, share=2, K=24, N=16, ranks=sizes[1])
    for leaf in (t.x, *t.as_, *t.bs):
        leaf.requires_grad_()
    absent = t.x.new_empty(0)
    biases = [absent if bias is None else bias for bias in t.lora_biases]
    rest = t.seeds, t.jobs, list(SCALES[:2]), list(PS[:2])
    fastlora_ops = torch.ops.fastlora
    torch.library.opcheck(fastlora_ops.jobs_linear.default, (t.x, t.w, t.bias, t.as_, t.bs, biases, *rest, backend))
    if backend == "torch":  # on the kernels the same launches again
        y = t.dy.clone().requires_grad_()
        torch.library.opcheck(fastlora_ops.jobs_update.default, (y, t.x, t.as_, t.bs, biases, *rest, backend))
    _, h = fastlora_ops.jobs_linear(t.x, t.w, t.bias, t.as_, t.bs, biases, *rest, backend)
    frozen = [f.detach() for f in t.as_], [f.detach() for f in t.bs]
    inputs = (t.dy, t.x.detach(), t.w, *frozen, [False, True], h.detach(), *rest, True, True, True, backend)
    torch.library.opcheck(fastlora_ops.jobs_backward.default, inputs)


def called(t: Layer, **options: Any) -> list[Tensor | None]:
    """y and the gradients of x and every factor by the functional op, from one torch seed."""
    torch.manual_seed(11)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (t.x, *t.as_, *t.bs)]
    x, G = leaves[0], len(t.as_)
    y = functional.jobs_linear(
        x, t.w, t.bias, leaves[1 : 1 + G], leaves[1 + G :], SCALES[:G], t.jobs, dropout_p=PS[:G],
        lora_biases=t.lora_biases, **options,
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, leaves, t.dy, allow_unused=True)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_salts_and_absent_jobs(backend: str, device: str) -> None:
    """A job's mask is its salt's, wherever it stands in the list; jobs without a row have no gradient, not zero."""
    t = layer([1, 0, 1, 1], "fp32", device, ranks=RANKS[:3])
    salts = torch.tensor([5, -9, 70], device=device)
    whole = called(t, salts=salts, backend=backend)
    assert whole[4] is None and whole[7] is None and whole[2] is not None
    order = [1, 0]
    lists = {name: [getattr(t, name)[j] for j in order] for name in ("as_", "bs", "lora_biases")}
    swapped = replace(t, jobs=[0, 1, 0, 0], **lists)
    torch.manual_seed(11)
    found = functional.jobs_linear(
        t.x, t.w, t.bias, swapped.as_, swapped.bs, [SCALES[j] for j in order], swapped.jobs,
        dropout_p=[PS[j] for j in order], lora_biases=swapped.lora_biases, salts=salts[order], backend=backend,
    )  # fmt: skip
    assert_same(found, whole[0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_second_derivative_is_refused(backend: str, device: str) -> None:
    t = layer([1, 0], "fp32", device, share=2, ranks=RANKS[:2])
    x = t.x.clone().requires_grad_()
    y = functional.jobs_linear(x, t.w, None, t.as_, t.bs, SCALES[:2], t.jobs, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()
