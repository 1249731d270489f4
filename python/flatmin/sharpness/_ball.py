"""The ball of weights around ``w`` in which a loss is maximised: its points, steps in it, random points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..curvature._measurement import Measurement, Part
from ._passes import STARTS, shift

__all__ = ["ADAPTIVE", "Ball"]

#: Names of the balls, as the operators know them.
ADAPTIVE: dict[bool | str, bool | str] = {False: False, True: "davda54", "asam": "asam", "davda54": "davda54"}


class Ball:
    """Weights ``w + T u`` with ``||u||_p <= rho``: ``T`` is 1, or the size of each weight.

    Points are lists ``u`` like the parameters, at least float32: in ``u`` the ball is that of a plain norm whatever
    ``T`` is, so that steps and projections need not know it.
    """

    def __init__(self, m: Measurement, rho: float, p: float, adaptive: bool | str, eta: float) -> None:
        self.m, self.rho, self.flat = m, rho, p == math.inf
        self.adaptive, self.eta = ADAPTIVE[adaptive], eta
        self.sizes: list[Tensor] | None = None
        if self.adaptive:
            with torch.no_grad():
                self.sizes = [self._size(w.to(z.dtype)) for w, z in zip(m.params, m.zeros(), strict=True)]

    def _size(self, w: Tensor) -> Tensor:
        if self.adaptive == "davda54":
            return w.abs()
        return w.abs() + self.eta if w.dim() > 1 else torch.ones_like(w)

    def _scaled(self, x: Sequence[Tensor]) -> list[Tensor]:
        return list(x) if self.sizes is None else [t * s for t, s in zip(x, self.sizes, strict=True)]

    def to(self, u: Sequence[Tensor]) -> Callable[[Part, Tensor], object]:
        """For :meth:`Measurement.moved`: to the point ``u``."""
        offsets = self._scaled(u)
        return lambda part, backup: shift(part.of(self.m.params), part.of(offsets))

    def sam(self, gradient: Sequence[Tensor]) -> Callable[[Part, Tensor], object] | None:
        """For :meth:`Measurement.moved`: SAM's step from ``w`` to the boundary. None where the gradient is 0."""
        options: dict[str, Any] = {"q": 1.0 if self.flat else 2.0, "adaptive": self.adaptive, "eta": self.eta}
        norms = [ops.norm(part.of(gradient), part.of(self.m.params), **options) for part in self.m.parts]
        length = math.fsum(map(float, norms)) if self.flat else math.hypot(*map(float, norms))
        if length == 0.0:
            return None

        def move(part: Part, backup: Tensor) -> None:
            norm = torch.full_like(norms[part.stream], length)
            ops.sam_ascend_(part.of(self.m.params), part.of(gradient), backup, norm, self.rho, **options)

        return move

    def step(self, u: Sequence[Tensor] | None, gradient: Sequence[Tensor], length: float) -> list[Tensor] | None:
        """From ``u`` (None: ``w``) a step of ``length`` up the gradient, and back on the ball. None without a slope."""
        slope = self._scaled(gradient)
        norm = self.m.norm(slope)
        if norm == 0.0:
            return None
        new = [t.sign() * length if self.flat else t * (length / norm) for t in slope]
        if u is not None:
            new = [a + b for a, b in zip(u, new, strict=True)]
        return self._project(new)

    def _project(self, u: list[Tensor]) -> list[Tensor]:
        if self.flat:
            return [t.clamp_(-self.rho, self.rho) for t in u]
        norm = self.m.norm(u)
        return [t.mul_(self.rho / norm) for t in u] if norm > self.rho else u

    def random(self, seed: int, draw: int) -> list[Tensor]:
        """A point distributed uniformly in the ball."""
        u = self.m.zeros()
        for part in self.m.parts:
            # one more element for the radius: the share of a ball of radius r is r^size
            extra = torch.zeros(1, dtype=torch.float64, device=part.device)
            key = part.key(seed, draw, STARTS)
            ops.probe_([*part.of(u), extra], key, distribution="uniform")
            if part.stream == 0:
                share = 0.5 * (float(extra) + 1.0)
            if not self.flat:
                ops.probe_(part.of(u), key, distribution="normal")
        if self.flat:
            return [t.mul_(self.rho) for t in u]
        radius = self.rho * share ** (1.0 / sum(t.numel() for t in u))
        norm = self.m.norm(u)
        return [t.mul_(radius / norm) for t in u]
