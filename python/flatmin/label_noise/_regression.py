"""Noise on the targets of a regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_one_of, check_size
from .._deprecated import renamed_arguments
from ..ops._labels import check_index
from ._stream import Stream

__all__ = ["RegressionNoise"]


class RegressionNoise:
    """Adds fresh noise to regression targets, ``y + sigma xi`` with xi of mean 0 and variance 1.

    Label-noise SGD (Damian, Ma and Lee 2021, arXiv 2106.06530, whose noise is Rademacher; HaoChen et al. 2020, arXiv
    2006.08680). Draw once per batch, before the first pass of SAM.

    Args:
        sigma: standard deviation >= 0, in units of the targets.
        distribution: of xi, "rademacher" (-1 or 1) or "normal".
        generator: to draw the seed from (once); by default torch's own.
    """

    @renamed_arguments(law="distribution")
    def __init__(
        self, sigma: float, distribution: str = "rademacher", *, generator: torch.Generator | None = None
    ) -> None:
        check_size("sigma", sigma)
        check_one_of("distribution", distribution, ("rademacher", "normal"))
        self.sigma, self.distribution = float(sigma), distribution
        self._stream = Stream(generator)

    def __call__(self, targets: Tensor, *, index: Tensor | int | None = None) -> Tensor:
        """New targets of the same type and shape; the given ones are not written.

        Args:
            targets: of a floating-point type, any shape. The draws are float32.
            index: int64, the numbers of the samples: the shape of the targets, or of their leading dimensions. See
                :class:`flatmin.LabelNoise`.
        """
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            given = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"targets: {given} given; give a floating-point tensor")
        if index is not None:
            index = check_index(index, targets, "targets")
        samples = targets.numel() if index is None else index.numel()
        key = self._stream.key(index is not None, targets.device)
        flat = None if index is None else index.flatten()
        xi = ops.draw_samples(
            samples, targets.numel() // max(samples, 1), key, distribution=self.distribution, index=flat
        )
        return targets + self.sigma * xi.view(targets.shape).to(targets.dtype)

    @property
    def seed(self) -> int:
        return self._stream.seed

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins: calls with ``index`` then draw anew."""
        self._stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Seed, number of calls and epoch."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw on where the noise with this :meth:`state_dict` stopped."""
        self._stream.load_state_dict(state)

    def __repr__(self) -> str:
        return f"RegressionNoise(sigma={self.sigma}, distribution={self.distribution!r})"
