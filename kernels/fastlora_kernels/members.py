"""Members of a group: layers that share one input, side by side in one launch.

A launch takes tuples, an element a member, and its loop over them is unrolled: each member keeps its own pointers,
strides and alignment. (A pointer that a branch chooses loses its alignment, and does not compile for AMD.)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastlora_kernels.launch import Layout

GROUP = 3
"""The most members of one launch: q, k and v."""


def masked(ps: Sequence[float], seeded: bool) -> tuple[int, ...]:
    """Which seed each member's mask is drawn from; −1: it drops nothing.

    ps: dropout probability of each member.   seeded: whether there are seeds; without any nobody drops.
    """
    return tuple(i if seeded and p > 0 else -1 for i, p in enumerate(ps))


def columns(h: Tensor | None, as_: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each member's view of h: [M, ΣR], or of dh; None for a member without an adapter, or where there is no h.

    as_: [R, K] each.
    """
    found: list[Tensor | None] = []
    start = 0
    for a in as_:
        R = a.shape[0] if a is not None else 0
        found.append(h[:, start : start + R] if h is not None and a is not None else None)
        start += R
    return found


def strides(members: Sequence[Layout]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The members' outer strides, and their inner ones."""
    return tuple(stride[0] for _, stride, _ in members), tuple(stride[1] for _, stride, _ in members)
