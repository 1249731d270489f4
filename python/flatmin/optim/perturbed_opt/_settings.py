"""What a PerturbedOPT was constructed with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Settings"]


class Settings(NamedTuple):
    """What a :class:`flatmin.PerturbedOPT` was constructed with."""

    distribution: str
    sizing: str
    curvature: str | Callable[[list[Tensor]], Sequence[Tensor | None]]
    lipschitz: str | float
    beta1: float
    beta2: float
    min_step: float
    schedule: str | Callable[[int], float] | None
    sync: str | ProcessGroup

    @property
    def curved(self) -> bool:
        return self.sizing == "curvature"

    @property
    def fed_by_steps(self) -> bool:
        """Whether the curvature is averaged from the gradients of the steps."""
        return self.curved and self.curvature == "squared_gradient"

    @property
    def learns_rho(self) -> bool:
        return isinstance(self.lipschitz, str)

    def decay(self, epoch: int) -> float:
        """Factor of the neighbourhood in an epoch."""
        if self.schedule is None:
            return 1.0
        if isinstance(self.schedule, str):
            return 1.0 / math.log(math.e - 1.0 + epoch)
        factor = float(self.schedule(epoch))
        if not 0.0 <= factor < math.inf:
            raise ValueError(f"schedule: gave {factor} for epoch {epoch}; it must give a finite float >= 0")
        return factor
