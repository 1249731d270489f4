"""Means with t intervals, and rank correlations with bootstrap intervals over settings and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from scipy import stats
except ImportError as error:
    raise SystemExit(f"error: scipy cannot be imported ({error}); pip install scipy") from error

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its 95 % interval; ``low`` and ``high`` are NaN where there is none."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if np.isnan(self.value):
            return "-"
        if np.isnan(self.low):
            return f"{self.value:{spec}}"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Array) -> tuple[Array, Array, Array]:
    """Mean over the last axis with its 95 % t interval. NaN among the values makes all three NaN; a single value has
    no interval."""
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    if count < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stats.t.ppf(0.975, count - 1) * values.std(axis=-1, ddof=1) / np.sqrt(count)
    return mean, mean - half, mean + half


def mean_of(values: Sequence[float] | Array) -> Interval:
    """:func:`mean_interval` of a list of numbers; of none, NaN."""
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    return Interval(*map(float, mean_interval(np.asarray(values, float))))


def share_interval(count: int, of: int) -> Interval:
    """A share in percent with its 95 % interval of Clopper and Pearson."""
    if not of:
        return Interval(np.nan, np.nan, np.nan)
    low, high = stats.binomtest(count, of).proportion_ci(0.95)
    return Interval(100.0 * count / of, 100.0 * float(low), 100.0 * float(high))


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation along the last axis, ties at mean ranks; NaN where either side is constant."""
    ranks = [stats.rankdata(values, axis=-1) for values in (x, y)]
    x, y = (r - r.mean(axis=-1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))


class Resamples:
    """Bootstrap resamples of a grid of settings by seeds, the same ones for every measure.

    Both levels vary: settings are drawn with replacement, then for each drawn one as many of its seeds as it has,
    again with replacement. So the interval covers another choice of seeds and another choice of the grid.

    Args:
        valid: [settings, seeds], the runs that count.
        draws: number of resamples.
        seed: of the drawing.
    """

    def __init__(self, valid: NDArray[np.bool_], draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rows = [np.flatnonzero(row) + i * valid.shape[1] for i, row in enumerate(valid) if row.any()]
        self.settings, self.runs = len(rows), int(valid.sum())
        self.all = np.concatenate(rows) if rows else np.zeros(0, int)
        if self.settings < 3:
            self.index = np.zeros((0, 0), int)
            return
        counts = np.array([len(row) for row in rows])
        table = np.stack([np.resize(row, counts.max()) for row in rows])
        drawn = rng.integers(len(rows), size=(draws, len(rows)))
        places = (rng.random((draws, len(rows), counts.max())) * counts[drawn][..., None]).astype(int)
        self.index = table[drawn[..., None], places].reshape(draws, -1)

    def correlation(self, measure: Array, gap: Array) -> Interval:
        """Spearman's correlation of ``measure`` with ``gap``, both [settings, seeds]."""
        return self.difference(measure, None, gap)

    def difference(self, measure: Array, other: Array | None, gap: Array) -> Interval:
        """By how much ``measure`` correlates better with ``gap`` than ``other`` does, on the same resamples."""
        if self.settings < 3:
            return Interval(np.nan, np.nan, np.nan)

        def value(index: NDArray[np.int_]) -> Array:
            x = spearman(measure.ravel()[index], gap.ravel()[index])
            return x if other is None else x - spearman(other.ravel()[index], gap.ravel()[index])

        drawn = value(self.index)
        drawn = drawn[np.isfinite(drawn)]  # a resample of a single setting can be constant
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        return Interval(float(value(self.all)), float(low), float(high))


def at_level(level: float, losses: Array, values: Array) -> Array:
    """``values`` where ``losses`` first falls to ``level``, linear between the two epochs around the crossing.

    Args:
        level: training loss.
        losses: [runs, epochs].
        values: [runs, epochs].

    Returns:
        [runs], NaN for runs that start below the level, never reach it, or have a NaN before it.
    """
    result = np.full(len(losses), np.nan)
    for i, (loss, value) in enumerate(zip(losses, values, strict=True)):
        below = np.flatnonzero(~(loss > level))  # a NaN stops the search too
        if len(below) and below[0] > 0:
            after = below[0]
            share = (loss[after - 1] - level) / (loss[after - 1] - loss[after])
            result[i] = value[after - 1] + share * (value[after] - value[after - 1])
    return result


def common_levels(losses: Array, count: int, share: float = 0.75) -> Array:
    """``count`` training losses, evenly spaced in their logarithm, that at least ``share`` of the runs pass through.

    ``losses`` is [runs, epochs]. Empty if there is no such range.
    """
    needed = int(np.ceil(share * len(losses)))
    finite = losses[np.isfinite(losses).all(axis=1)]
    if len(finite) < max(needed, 1):
        return np.zeros(0)
    low = np.sort(finite.min(axis=1))[needed - 1]
    high = np.sort(finite[:, 0])[-needed]
    return np.geomspace(high, low, count + 2)[1:-1] if low < high else np.zeros(0)
