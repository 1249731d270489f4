"""How much of each measure fits into a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._checks import check_int

__all__ = ["AMOUNTS", "FULL", "LEAST", "Plan", "check_amounts", "groups_within", "planned"]

#: Shares of a budget: all that takes Hessian-vector products or passes of a few draws, and the groups.
_PRODUCTS_SHARE, _GROUPS_SHARE = 0.7, 0.2
#: A forward pass and a gradient in units of a product, from above.
_FORWARD, _GRADIENT = 0.3, 0.6
_LEAST_SAMPLES = 64
_GROUPS = (2, 64)  # fewest and most groups of one size


class Plan(NamedTuple):
    """Numbers of products, probes and draws.

    Attributes:
        products: Hessian-vector products for the eigenvalues, at most.
        probes, steps: of the spectral density.
        pairs: of draws of noise, u and -u, for each expected sharpness.
        curvature_samples: probes for the Hessian's diagonal, at the weights and once more beside them.
        noise_samples: draws of PACGen's noise.
        seconds_for_groups: for all m-sharpness; infinite without a budget.
    """

    products: int
    probes: int
    steps: int
    pairs: int
    curvature_samples: int
    noise_samples: int
    seconds_for_groups: float = math.inf

    def cost(self) -> float:
        """In products over the data."""
        products = self.products + self.probes * self.steps + 2 * self.curvature_samples
        passes = 4 * self.pairs + self.noise_samples + 4
        return products + _FORWARD * passes + _GRADIENT


LEAST = Plan(products=25, probes=2, steps=12, pairs=2, curvature_samples=4, noise_samples=2)
FULL = Plan(products=100, probes=5, steps=30, pairs=10, curvature_samples=20, noise_samples=10)

#: What can be given as ``amounts``; two of them are no part of a plan.
AMOUNTS = ("samples", *Plan._fields[:-1], "groups")


def check_amounts(amounts: Any) -> dict[str, int]:
    if not isinstance(amounts, Mapping):
        raise TypeError(f"amounts: {amounts!r} given; give a dictionary of numbers, as {{'samples': 1000}}")
    for name, count in amounts.items():
        if name not in AMOUNTS:
            raise ValueError(f"amounts: {name!r} is none; there are {', '.join(AMOUNTS)}")
        check_int(f"amounts: {name}", count, 1)
    return dict(amounts)


def planned(seconds: float, product_time: float, samples: int) -> tuple[Plan, int]:
    """The plan for ``seconds``, and on how many of the ``samples`` it works.

    Args:
        seconds: that are left; may be negative.
        product_time: of a Hessian-vector product, for one sample.
        samples: in the data.
    """
    here = max(seconds, 0.0) * _PRODUCTS_SHARE / product_time  # products of one sample
    used = min(samples, max(math.floor(here / LEAST.cost()), min(samples, _LEAST_SAMPLES)))
    share = (here / used - LEAST.cost()) / (FULL.cost() - LEAST.cost())
    share = min(max(share, 0.0), 1.0)
    numbers = [math.floor(low + share * (high - low)) for low, high in zip(LEAST[:-1], FULL[:-1], strict=True)]
    return Plan(*numbers)._replace(seconds_for_groups=max(seconds, 0.0) * _GROUPS_SHARE), used


def groups_within(seconds: float, group_time: float) -> int:
    """How many groups to measure."""
    least, most = _GROUPS
    return most if math.isinf(seconds) else min(most, max(least, math.floor(seconds / max(group_time, 1e-9))))
