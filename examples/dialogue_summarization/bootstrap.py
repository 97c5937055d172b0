"""How sure a score is: percentile intervals of a bootstrap over dialogues, the same resamples for every row.

Because every row is resampled alike, the difference of two rows is too: a paired bootstrap (Koehn 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

RESAMPLES = 2000
LEVEL = 95
Array = NDArray[np.float64]
Score = Callable[[Array], Array]
"""From samples of dialogues, [samples, n, f], to a score of each, [samples]; f figures are known of a dialogue."""


@dataclass(frozen=True)
class Interval:
    """A score of all dialogues, and the percentiles between which `LEVEL` % of its resamples lie."""

    value: float
    low: float
    high: float

    def apart(self, other: Interval) -> bool:
        """Whether the two have nothing in common."""
        return self.low > other.high or self.high < other.low

    @property
    def sure(self) -> bool:
        """Whether zero is outside."""
        return not self.low <= 0 <= self.high


def mean(samples: Array) -> Array:
    """Of one figure."""
    return samples[..., 0].mean(1)


def ratio(samples: Array) -> Array:
    """Sum over sum, of two figures: loss a token, where dialogues have many or few."""
    total = samples.sum(1)
    return total[:, 0] / total[:, 1]


def bleu(samples: Array) -> Array:
    """Corpus BLEU, of what `measures` counts: n-grams in common and in all for n = 1…4, both lengths."""
    totals = samples.sum(1).astype(int).tolist()
    return np.array([BLEU.compute_bleu(t[:4], t[4:8], *t[8:], smooth_method="exp").score for t in totals])


def resamples(n: int, count: int = RESAMPLES) -> NDArray[np.int64]:
    """Which dialogues each resample draws, with replacement: [count, n]."""
    return np.random.default_rng(0).integers(n, size=(count, n))


def interval(score: Score, figures: Array, less: Array | None = None, count: int = RESAMPLES) -> Interval:
    """Of a row's figures, [n, f]; less: of the difference to another row's, dialogue by dialogue."""
    drawn = resamples(len(figures), count)
    samples, value = score(figures[drawn]), score(figures[None])[0]
    if less is not None:
        samples, value = samples - score(less[drawn]), value - score(less[None])[0]
    low, high = np.percentile(samples, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
