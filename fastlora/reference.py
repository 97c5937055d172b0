"""The plain-torch twin of every op: the equations of LoRA as written, and the oracle of every test.

Same names and letters as the kernels; no cleverness. Whatever dtype comes in, sums run in fp32 (fp64 for fp64 inputs)
and each result is rounded once.  (Hu et al. 2021, "LoRA", §4.1; Salmon et al. 2011 for Philox)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _philox(counter: tuple[Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox-4x32-10 at counter (c0, c1, 0, 0) under the 64-bit key `seed`: four 32-bit words, each held in int64."""
    c0, c1 = torch.broadcast_tensors(*counter)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        left, right = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]  # the low 64 bits survive int64 overflow
        c0, c1, c2, c3 = (
            ((right >> 32) & _WORD) ^ c1 ^ k0,
            right & _WORD,
            ((left >> 32) & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _WORD, (k1 + _PHILOX_W[1]) & _WORD
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """The 16-bit lane value below which an element is dropped, round(65536·p); p in [0, 1)."""
    return min(round(65536 * p), 65535)


def dropout_scale(p: float) -> float:
    """What a kept element is multiplied by, 65536 / (65536 − threshold): 1/(1−p) for the p that 16 bits can hold."""
    return 65536 / (65536 - dropout_threshold(p))


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The bits every kernel reproduces: keep[row, col] = lane(seed, row, col) ≥ round(65536·p).

    Philox-4x32-10 with counter (row, col//8, 0, 0) and key `seed` gives four words, eight 16-bit lanes; column col
    takes lane col % 8, the low half of a word before its high half.

    seed: [] or [1] int64.   p: dropout probability in [0, 1).
    Returns keep: [M, K] bool, True where the element survives.
    """
    device = seed.device
    rows = torch.arange(M, device=device)[:, None]
    groups = torch.arange((K + 7) // 8, device=device)[None, :]
    words = torch.stack(_philox((rows, groups), seed.reshape(())), dim=-1)  # [M, K/8, 4]
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :K]
    return lanes >= dropout_threshold(p)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype sums run in: fp64 as soon as one operand is fp64, fp32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(x): dropped values are selected away (never multiplied by 0, so inf and NaN vanish too)."""
    if p == 0 or seed is None:
        return x
    keep = dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(keep, x * dropout_scale(p), 0)


def shrink(x: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Low-rank activation, h = drop(x) · aᵀ  (shrink).

    x: [M, K].   a: [R, K].   p, seed: dropout, see `dropout_mask`.   Returns h: [M, R] fp32 (fp64 for fp64 inputs).
    """
    wide = _wide(x, a)
    return _drop(x.to(wide), p, seed) @ a.to(wide).t()


def low_rank(h: Tensor, b: Tensor, scale: float, lora_bias: Tensor | None = None) -> Tensor:
    """The low-rank update alone, scale·h·bᵀ + scale·lora_bias, unrounded.   Returns [M, N] in h's dtype."""
    update = h @ b.to(h.dtype).t()
    if lora_bias is not None:
        update = update + lora_bias.to(h.dtype)
    return update * scale


def expand(
    x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float, lora_bias: Tensor | None = None
) -> Tensor:
    """y = x·wᵀ + bias + scale·h·bᵀ + scale·lora_bias, rounded once.

    x: [M, K].   w: [N, K].   bias, lora_bias: [N].   h: [M, R].   b: [N, R].   Returns y: [M, N] in x's dtype.
    """
    y = x.to(h.dtype) @ w.to(h.dtype).t() + low_rank(h, b, scale, lora_bias)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype)


def add_expand(
    y: Tensor, h: Tensor, b: Tensor, scale: float, lora_bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """y + scale·h·bᵀ + scale·lora_bias, rounded once to `dtype` (y's own by default): the *split* strategy's expand."""
    return (y.to(h.dtype) + low_rank(h, b, scale, lora_bias)).to(dtype or y.dtype)


def dy_pass(dy: Tensor, h: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dh = scale·dy·b   and   db = scale·dyᵀ·h.   Returns dh: [M, R] fp32, db: [N, R] in b's dtype."""
    wide = _wide(dy, h, b)
    dh = (dy.to(wide) @ b.to(wide)) * scale
    db = (dy.to(wide).t() @ h.to(wide)) * scale
    return dh, db.to(b.dtype)


def x_pass(x: Tensor, dh: Tensor, dtype: torch.dtype, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """da = dhᵀ · drop(x).   Returns da: [R, K] in `dtype`."""
    return (dh.t() @ _drop(x.to(dh.dtype), p, seed)).to(dtype)


def dx(dy: Tensor, w: Tensor | None, dh: Tensor, a: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """dx = dy·w + mask/(1−p) ⊙ (dh·a), rounded once; without w, the low-rank term alone.

    dy: [M, N].   w: [N, K] or None.   dh: [M, R].   a: [R, K].   Returns dx: [M, K] in dy's dtype.
    """
    grad = _drop(dh @ a.to(dh.dtype), p, seed)
    if w is not None:
        grad = grad + dy.to(dh.dtype) @ w.to(dh.dtype)
    return grad.to(dy.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    lora_bias: Tensor | None = None,
    backend: str | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias + scaling·(drop(x)·lora_Aᵀ·lora_Bᵀ + lora_bias), by autograd through plain operators.

    x: [..., K].   weight: [N, K].   bias, lora_bias: [N].   lora_A: [R, K].   lora_B: [N, R].   scaling: number or 0-d.
    backend is taken for the twin's signature and ignored.   seed: [] int64, drawn by torch.randint when dropout is on
    and none is given.   Returns y: [..., N] in x's dtype, rounded once.
    """
    p = dropout_p if training else 0.0
    if p > 0 and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=x.device, dtype=torch.int64)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    wide = _wide(x, weight, lora_A, lora_B)
    y = rows.to(wide) @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    update = shrink(rows, lora_A, p=p, seed=seed) @ lora_B.to(wide).t()
    if lora_bias is not None:
        update = update + lora_bias.to(wide)
    y = y + update * scaling
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    scalings: Sequence[float | Tensor],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    lora_biases: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x·weight_iᵀ + bias_i + scaling_i·(drop_i(x)·lora_A_iᵀ·lora_B_iᵀ + lora_bias_i) for layers that share x.

    Every member as `lora_linear` has it; where lora_A is None, y_i = x·weight_iᵀ + bias_i.   dropout_p: one for all or
    one each.   seeds: [members] int64, drawn when dropout is on and none are given; every mask is independent.
    Returns a y: [..., N_i] for each member.
    """
    count = len(weights)
    ps = [dropout_p] * count if isinstance(dropout_p, (int, float)) else list(dropout_p)
    if training and any(ps) and seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (count,), device=x.device, dtype=torch.int64)
    ys = []
    for i, (weight, bias, a, b) in enumerate(zip(weights, biases, lora_As, lora_Bs, strict=True)):
        if a is None or b is None:
            wide = _wide(x, weight)
            y = x.to(wide) @ weight.to(wide).t()
            ys.append((y if bias is None else y + bias.to(wide)).to(x.dtype))
            continue
        lora_bias = lora_biases[i] if lora_biases is not None else None
        seed = seeds[i] if seeds is not None else None
        ys.append(
            lora_linear(
                x, weight, bias, a, b, scalings[i],
                dropout_p=ps[i], training=training, lora_bias=lora_bias, backend=backend, seed=seed,
            )
        )  # fmt: skip
    return tuple(ys)


class Projection(NamedTuple):
    """One of the three layers of a gated MLP, as in `lora_linear`; a plain layer where lora_A and lora_B are None."""

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float | Tensor = 1.0
    lora_bias: Tensor | None = None
    dropout_p: float = 0.0


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda g: g * torch.sigmoid(g),
    "gelu": lambda g: 0.5 * g * (1 + torch.erf(g * math.sqrt(0.5))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "relu": lambda g: g.clamp(min=0),
    "relu2": lambda g: g.clamp(min=0) ** 2,
}
"""What may gate: Elfwing et al. 2017 for SiLU, Hendrycks and Gimpel 2016 for both GELUs, So et al. 2021 for ReLU²."""


def glu(
    g: Tensor, u: Tensor, activation: str, a: Tensor | None = None, *, p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """z = act(g) ⊙ u, rounded once, and h = drop(z)·aᵀ of that z: what a gated MLP's last layer reads.

    g, u: [M, I].   activation: one of ACTIVATIONS.   a: [R, I] or None.   Returns z in g's dtype, h: [M, R] fp32.
    """
    wide = _wide(g)
    z = (ACTIVATIONS[activation](g.to(wide)) * u.to(wide)).to(g.dtype)
    return z, None if a is None else shrink(z, a, p=p, seed=seed)


def glu_backward(g: Tensor, u: Tensor, dz: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dg = dz ⊙ u ⊙ act'(g)   and   du = dz ⊙ act(g), each rounded once.   Returns both in g's dtype."""
    wide = _wide(g)
    with torch.enable_grad():
        inner = g.detach().to(wide).requires_grad_()
        gate = ACTIVATIONS[activation](inner)
        (slope,) = torch.autograd.grad(gate.sum(), inner)
    return (dz.to(wide) * u.to(wide) * slope).to(g.dtype), (dz.to(wide) * gate.detach()).to(g.dtype)


def lora_gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str,
    *,
    training: bool = True,
    backend: str | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)), each of the three with its low-rank update or plain.

    x: [..., K].   activation: one of ACTIVATIONS.   seeds: [3] int64, drawn when dropout is on and none are given; the
    masks are independent.   The rest as in `lora_linear`.   Returns y: [..., N] in x's dtype, rounded once as gate(x),
    up(x) and their product are.
    """
    if training and any(layer.dropout_p for layer in (gate, up, down)) and seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (3,), device=x.device, dtype=torch.int64)

    def run(x: Tensor, layer: Projection, at: int) -> Tensor:
        (y,) = lora_linear_group(
            x, [layer.weight], [layer.bias], [layer.lora_A], [layer.lora_B], [layer.scaling],
            dropout_p=layer.dropout_p, training=training, lora_biases=[layer.lora_bias], backend=backend,
            seeds=None if seeds is None else seeds[at : at + 1],
        )  # fmt: skip
        return y

    z, _ = glu(run(x, gate, 0), run(x, up, 1), activation)
    return run(z, down, 2)


def jobs_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    jobs: Sequence[int],
    *,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    lora_biases: Sequence[Tensor | None] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """One frozen layer for several jobs, each by `lora_linear` on its own rows alone, put back in their places.

    x: [..., K].   jobs: the job of each request, −1 for the base alone; as many rows of x for each.   seeds: [G] int64,
    of the masks, whose row 0 is a job's first.   The rest as in `lora_linear`, an entry a job.   Returns y: [..., N].
    """
    rows, count = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), len(lora_As)
    owner = torch.tensor(jobs).repeat_interleave(len(rows) // len(jobs))
    ps = [dropout_p] * count if isinstance(dropout_p, (int, float)) else dropout_p
    wide = _wide(x, weight)
    base = rows.to(wide) @ weight.to(wide).t() + (0 if bias is None else bias.to(wide))
    y = base.to(x.dtype)
    for job, (a, b, scaling, p) in enumerate(zip(lora_As, lora_Bs, scalings, ps, strict=True)):
        at = (owner == job).nonzero()[:, 0].to(x.device)
        mine = lora_linear(
            rows[at], weight, bias, a, b, scaling, dropout_p=p, training=training,
            lora_bias=lora_biases[job] if lora_biases is not None else None,
            seed=seeds[job] if seeds is not None else None,
        )  # fmt: skip
        y = y.index_copy(0, at, mine)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def multi_shrink(x: Tensor, a_pool: Tensor, start: Tensor, rank: Tensor, width: int, slots: Tensor) -> Tensor:
    """h[row] = x[row]·aᵀ for the adapter of each row, of every layer that shares x; 0 past its rank.

    x: [M, K].   a_pool: [members, T, K], rank rows.   start: [G], rank: [members, G]: where a slot's rows lie.
    slots: [M], the slot of each row, −1 for base only.   Returns h: [members, M, width] fp32 (fp64 for fp64 inputs).
    """
    wide = _wide(x, a_pool)
    h = x.new_zeros((len(a_pool), len(x), width), dtype=wide)
    for row, slot in enumerate(slots.tolist()):
        for member in range(len(a_pool)):
            if slot >= 0 and rank[member, slot] > 0:
                first, r = int(start[slot]), int(rank[member, slot])
                h[member, row, :r] = a_pool[member, first : first + r].to(wide) @ x[row].to(wide)
    return h


def multi_expand(
    ys: Sequence[Tensor],
    h: Tensor,
    b_pools: Sequence[Tensor],
    start: Tensor,
    rank: Tensor,
    scaling: Tensor,
    biased: Tensor,
    slots: Tensor,
) -> list[Tensor]:
    """y[row] + scaling·(h[row]·b + bias) for the adapter of each row, rounded once; other rows as they are.

    ys: [M, N] each.   h: as from `multi_shrink`.   b_pools: [T, N] each; where biased: [members, G] is set, the row
    after an adapter's last is its lora_bias.   scaling: [members, G].   Returns new ys.
    """
    out = [y.clone() for y in ys]
    for row, slot in enumerate(slots.tolist()):
        for member, (y, b_pool) in enumerate(zip(out, b_pools, strict=True)):
            if slot >= 0 and rank[member, slot] > 0:
                first, r = int(start[slot]), int(rank[member, slot])
                update = h[member, row, :r] @ b_pool[first : first + r].to(h.dtype)
                if biased[member, slot]:
                    update = update + b_pool[first + r].to(h.dtype)
                y[row] = (y[row].to(h.dtype) + update * scaling[member, slot]).to(y.dtype)
    return out


def multi_drop(x: Tensor, slots: Tensor, seeds: Tensor, ps: Sequence[float]) -> Tensor:
    """drop(x) of rows that have a slot each, by the slot's seed and p, at [row among the slot's own, col].

    x: [M, K].   slots: [M], −1 for rows that are left alone.   seeds: [G] int64.   Returns [M, K].
    """
    out = x.clone()
    for slot, p in enumerate(ps):
        out[slots == slot] = _drop(x[slots == slot], p, seeds[slot])
    return out


def multi_outer(x: Tensor, f: Tensor, start: Tensor, rank: Tensor, factor: Tensor, slots: Tensor, rows: int) -> Tensor:
    """out[start : start + rank] = factor·Σ f[row, :rank]ᵀ·x[row] over the rows of each slot: da and db as rank rows.

    x: [M, K].   f: [M, width].   start, rank, factor: [G].   slots: [M].   Returns [rows, K] in x's dtype.
    """
    out = x.new_zeros((rows, x.shape[1]))
    for slot in range(len(start)):
        first, r, mine = int(start[slot]), int(rank[slot]), slots == slot
        out[first : first + r] = factor[slot] * (f[mine, :r].t() @ x[mine])
    return out
