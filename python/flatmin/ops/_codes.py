"""Words of the public operators, and the integers that the raw ones take for them."""

from __future__ import annotations

import math

from .. import reference
from .._checks import check_one_of

__all__ = ["distribution_code", "dual_exponent", "scaling_code", "source_code"]

_SCALING = {
    False: reference.NONE,
    True: reference.ASAM,
    "asam": reference.ASAM,
    "davda54": reference.DAVDA54,
    "big_vision": reference.BIG_VISION,
}
_DISTRIBUTIONS = {
    "uniform": reference.UNIFORM,
    "normal": reference.NORMAL,
    "truncated_normal": reference.TRUNCATED,
    "rademacher": reference.RADEMACHER,
}
_SOURCES = {"square": reference.SQUARE, "plain": reference.PLAIN, "probed": reference.PROBED}


def scaling_code(adaptive: bool | str) -> int:
    """The integer that the raw operators take for an ``adaptive`` convention; ``ValueError`` for an unknown one."""
    check_one_of("adaptive", adaptive, _SCALING)
    return _SCALING[adaptive]


def distribution_code(distribution: str) -> int:
    """The same for a distribution."""
    check_one_of("distribution", distribution, _DISTRIBUTIONS)
    return _DISTRIBUTIONS[distribution]


def source_code(source: str) -> int:
    """The same for what a curvature average is fed with."""
    check_one_of("source", source, _SOURCES)
    return _SOURCES[source]


def dual_exponent(p: float) -> float:
    """``q`` with 1/p + 1/q = 1, for a radius measured in the p-norm; ``ValueError`` unless 1 <= p <= inf."""
    if not p >= 1.0:
        raise ValueError(f"p: {p} given, but a norm needs 1 <= p <= inf (2.0 is SAM's default)")
    if p == 1.0:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1.0)
