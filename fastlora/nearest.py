"""What a soft prompt says, as far as words can tell: the tokens of the vocabulary nearest to each virtual token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 16384
"""Rows of the vocabulary that are compared at once."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The tokens nearest to each of P virtual tokens, nearest first.

    metric: "cosine", "dot" or "euclidean".   ids: [P, k], tokens.   scores: [P, k]: similarity, or distance.
    tightness: [P], the mean cosine between two of a virtual token's neighbours: 1 for one meaning in k spellings.
    background: the same between two tokens of the vocabulary at large, what a cluster of nothing in common has.
    coordinates: [P, 1 + k, 2], the virtual token and its neighbours on their two principal axes.
    words: [P][k], the tokens as text, or their ids where no tokenizer was given.
    """

    metric: str
    ids: Tensor
    scores: Tensor
    tightness: Tensor
    background: float
    coordinates: Tensor
    words: list[list[str]]

    def __str__(self) -> str:
        width = max(len(word) for row in self.words for word in row)
        lines = [f"virtual  tightness  nearest by {self.metric} (two tokens at large: {self.background:.3f})"]
        for i, (row, scores) in enumerate(zip(self.words, self.scores.tolist(), strict=True)):
            cells = (f"{word:<{width}} {score:6.3f}" for word, score in zip(row, scores, strict=True))
            lines.append(f"{i:>7}  {float(self.tightness[i]):9.3f}  {'  '.join(cells)}")
        return "\n".join(lines)

    def plot(self, path: Any) -> None:
        """Draw the coordinates into an image file, each virtual token with lines to its neighbours; with matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 7), layout="constrained")
        axes = figure.add_subplot(xlabel="first principal axis", ylabel="second", title="Virtual tokens and neighbours")
        for i, points in enumerate(self.coordinates.tolist()):
            (x, y), colour = points[0], f"C{i % 10}"
            for (u, v), word in zip(points[1:], self.words[i], strict=True):
                axes.plot([x, u], [y, v], color=colour, linewidth=0.5, marker=".", markevery=[1])
                axes.annotate(word.replace("$", r"\$"), (u, v), fontsize=6)
            axes.annotate(str(i), (x, y), color="white", ha="center", va="center", fontsize=7, zorder=4)
            axes.scatter([x], [y], color=colour, s=120, zorder=3)
        figure.savefig(path)


@torch.no_grad()
def neighbours(rows: Tensor, embedding: nn.Embedding, k: int, metric: str, tokenizer: Any = None) -> Neighbours:
    """The k tokens nearest to each of rows: [P, d], as the embedding gives them; the vocabulary is read in pieces.

    Raises ValueError for a k that is not 1 to the vocabulary's size, or a metric that is none.
    """
    V = len(embedding.weight)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= V:
        raise ValueError(f"k: got {k!r}, wanted a whole number from 1 to {V}, the vocabulary's")
    if metric not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"metric: got {metric!r}, wanted 'cosine', 'dot' or 'euclidean'")
    rows = rows.detach().float()
    best, ids = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
    total = torch.zeros_like(rows[0])
    for start in range(0, V, CHUNK):
        here = torch.arange(start, min(V, start + CHUNK), device=rows.device)
        tokens = embedding(here).float()
        best = torch.cat([best, _closeness(rows, tokens, metric)], 1)
        ids = torch.cat([ids, here.expand(len(rows), -1)], 1)
        best, order = best.topk(min(k, best.shape[1]), 1)
        ids = ids.gather(1, order)
        total = total + F.normalize(tokens, dim=1).sum(0)
    found = embedding(ids).float()
    said = tokenizer.convert_ids_to_tokens if tokenizer is not None else lambda row: map(str, row)
    return Neighbours(
        metric,
        ids.cpu(),
        (-best if metric == "euclidean" else best).cpu(),
        _mean_cosine(F.normalize(found, dim=-1).sum(1), k).cpu(),
        float(_mean_cosine(total, V)),
        _principal(torch.cat([rows[:, None], found], 1)).cpu(),
        [list(said(row)) for row in ids.tolist()],
    )


def _closeness(rows: Tensor, tokens: Tensor, metric: str) -> Tensor:
    """[P, C], the larger the nearer."""
    if metric == "euclidean":
        return -torch.cdist(rows, tokens)
    if metric == "cosine":
        rows, tokens = F.normalize(rows, dim=1), F.normalize(tokens, dim=1)
    return rows @ tokens.T


def _mean_cosine(summed: Tensor, count: int) -> Tensor:
    """The mean over pairs of `count` unit vectors, of their sum: |Σu|² = n + Σ of u·v over the ordered pairs."""
    pairs = max(count * (count - 1), 1)
    return (summed.square().sum(-1) - count) / pairs if count > 1 else torch.ones_like(summed[..., 0])


def _principal(points: Tensor) -> Tensor:
    """points: [..., d] on the two axes along which they spread most: [..., 2]."""
    flat = points.flatten(0, -2)
    centred = flat - flat.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    return (centred @ axes.T).unflatten(0, points.shape[:-1])
