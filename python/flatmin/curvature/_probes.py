"""Hessian products with random vectors, and the mean and standard error of what comes of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._checks import check_int, check_one_of
from ._arguments import check_seed
from ._hvp import check_method
from ._measurement import Measurement, Part

__all__ = [
    "Estimate",
    "Moments",
    "Probed",
    "Probes",
    "ScalarEstimate",
    "check_sampling",
    "scalar_estimate",
    "student_quantile",
]


class Estimate(NamedTuple):
    """A mean over random samples, for each element of the parameters.

    Attributes:
        value: tensors like the parameters.
        stderr: standard error of ``value`` over the samples, tensors like it; NaN from one sample. It does not include
            that the data are themselves a sample.
        samples: how many.
    """

    value: list[Tensor]
    stderr: list[Tensor]
    samples: int


class ScalarEstimate(NamedTuple):
    """A mean over random samples, its standard error (NaN from one sample), and how many samples."""

    value: float
    stderr: float
    samples: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Where the true value lies with probability ``level``: by Student's t with samples - 1 degrees of freedom."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: {level} given; give a probability between 0 and 1, as 0.95")
        half = student_quantile(1.0 - level, self.samples - 1) * self.stderr if self.samples > 1 else math.nan
        return self.value - half, self.value + half


def scalar_estimate(values: Sequence[float]) -> ScalarEstimate:
    """Mean and standard error of independent values."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return ScalarEstimate(sum(values) / n, math.nan, n)
    spread = statistics.stdev(values) if n > 1 else math.nan
    return ScalarEstimate(math.fsum(values) / n, spread / math.sqrt(n), n)


def student_quantile(p: float, n: int) -> float:
    """What the absolute value of Student's t with ``n`` degrees of freedom exceeds with probability ``p`` (Hill 1970,
    Algorithm 396 of the ACM: 6 digits)."""
    if n == 1:
        return 1.0 / math.tan(p * math.pi / 2.0)
    if n == 2:
        return math.sqrt(2.0 / (p * (2.0 - p)) - 2.0)
    a = 1.0 / (n - 0.5)
    b = 48.0 / a**2
    c = ((20700.0 * a / b - 98.0) * a - 16.0) * a + 96.36
    d = ((94.5 / (b + c) - 3.0) / b + 1.0) * math.sqrt(a * math.pi / 2.0) * n
    y = (d * p) ** (2.0 / n)
    if y > 0.05 + a:
        x = statistics.NormalDist().inv_cdf(p / 2.0)
        y = x * x
        if n < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5.0) * x - 7.0) * x - 2.0) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36.0) * y + 94.5) / c - y - 3.0) / b + 1.0) * x
        y = math.expm1(a * y * y)
    else:
        tail = ((n + 6.0) / (n * y) - 0.089 * d - 0.822) * (n + 2.0) * 3.0
        y = ((1.0 / tail + 0.5 / (n + 4.0)) * y - 1.0) * (n + 1.0) / (n + 2.0) + 1.0 / y
    return math.sqrt(n * y)


class Probed(NamedTuple):
    """What :func:`flatmin.ops.curvature_` averages: ``x`` if ``source`` is "plain"; if it is "probed", ``v o x`` with
    the Rademacher vectors ``v`` of ``keys``, one key for each part."""

    x: list[Tensor]
    source: str
    keys: Sequence[Tensor | None]

    @classmethod
    def plain(cls, x: list[Tensor], m: Measurement) -> Probed:
        return cls(x, "plain", [None] * len(m.parts))


class Probes:
    """Random vectors ``v``, made from their keys wherever they are needed, and their ``v o (H v)``.

    Args:
        m: the measurement.
        distribution: "rademacher" or "normal".
        difference: take ``H v`` by finite differences. Then no vector is in memory during a pass over the data.
        step: of the differences, None for :meth:`Measurement.step_size` at the expected ``||v||``.
        seed: of the vectors.
    """

    def __init__(self, m: Measurement, distribution: str, difference: bool, step: float | None, seed: int) -> None:
        self.m, self.distribution, self.seed = m, distribution, seed
        self.vectors = None if difference else m.zeros()
        if difference:
            self.step = float(step) if step else m.step_size(math.sqrt(sum(p.numel() for p in m.params)))

    def __getitem__(self, draw: int) -> Probed:
        keys = [part.key(self.seed, draw) for part in self.m.parts]
        if self.vectors is None:
            x = self._difference(keys)
        else:
            for part, key in zip(self.m.parts, keys, strict=True):
                ops.probe_(part.of(self.vectors), key, distribution=self.distribution)
            x = self.m.hvp(self.vectors)
        if self.distribution == "rademacher":
            return Probed(x, "probed", keys)
        for part, key in zip(self.m.parts, keys, strict=True):
            for t, v in zip(part.of(x), self._vectors(part, key), strict=True):
                t.mul_(v)
        return Probed.plain(x, self.m)

    def _vectors(self, part: Part, key: Tensor) -> list[Tensor]:
        """In float32 at least: what noise adds to 16-bit weights is rounded with the sum, not before."""
        like = part.of(self.m.params)
        v = [torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in like]
        ops.probe_(v, key, distribution=self.distribution)
        return v

    def _difference(self, keys: Sequence[Tensor]) -> list[Tensor]:
        m = self.m

        def move(scale: float, part: Part, backup: Tensor) -> None:
            ops.scaled_noise_(
                part.of(m.params), backup, keys[part.stream], distribution=self.distribution, eps=1.0, scale=scale
            )

        return m.difference(partial(move, self.step), partial(move, -self.step), self.step)


class Moments:
    """Running mean and variance of ``v o x``, each sample's distance taken from the mean so far (Welford 1962): no
    cancellation, however small the variance.

    Args:
        m: the measurement.
        keep_means: keep the mean of each sample over each tensor, for :meth:`tensor_means`.
    """

    def __init__(self, m: Measurement, keep_means: bool = False) -> None:
        self.m = m
        self.count = 0
        self._means: list[list[Tensor]] | None = [] if keep_means else None
        self.mean, self.variance, self.delta = m.zeros(), m.zeros(), m.zeros()

    def add(self, probed: Probed) -> None:
        self.count += 1
        decay = 1.0 - 1.0 / self.count
        before = None if self._means is None else self._averages(self.mean)
        for part, key in zip(self.m.parts, probed.keys, strict=True):
            x, mean, delta = part.of(probed.x), part.of(self.mean), part.of(self.delta)
            feed: dict[str, Any] = {"source": probed.source, "key": key}
            for d, mu in zip(delta, mean, strict=True):
                d.copy_(mu)
            ops.curvature_(delta, x, decay=0.5, source_scale=-1.0, **feed)  # half the distance
            ops.curvature_(part.of(self.variance), delta, decay=decay, source_scale=4.0 * decay)
            ops.curvature_(mean, x, decay=decay, **feed)
        if self._means is not None and before is not None:
            steps = self._averages(self.delta)  # halves of the distances, which come from the mean before
            self._means.append([b - 2.0 * d for b, d in zip(before, steps, strict=True)])

    def _averages(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.mean(dtype=torch.float32 if t.device.type == "mps" else torch.float64) for t in tensors]

    def tensor_means(self) -> list[list[float]]:
        """For each sample the mean of ``v o x`` over each tensor (NaN of an empty one)."""
        return [list(map(float, sample)) for sample in self._means or []]

    def estimate(self) -> Estimate:
        for t in self.variance:
            t.div_(self.count - 1).sqrt_()
        return Estimate(self.mean, self.variance, self.count)


def check_sampling(samples: int, distribution: str, method: str, step: float | None, seed: int) -> bool:
    """Whether ``method`` is that of finite differences."""
    check_int("samples", samples, 1)
    check_seed(seed)
    check_one_of("distribution", distribution, ("rademacher", "normal"))
    return check_method(method, step)
