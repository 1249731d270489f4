"""Checks of arguments that every side of the package needs: each message names the argument and says what to give.

numpy's scalars are numbers too (:mod:`numbers`); a bool is the integer that Python makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_finite",
    "check_finite_radius",
    "check_fraction",
    "check_int",
    "check_one_of",
    "check_radius",
    "check_size",
    "is_number",
    "plain",
]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number and no tensor."""
    return isinstance(value, int | float) or (not isinstance(value, Tensor) and isinstance(value, Real))


def plain(value: Any) -> Any:
    """A scalar of numpy as Python's own, since checkpoints are loaded with ``weights_only=True``; anything else as it
    is."""
    if type(value) in (bool, int, float) or isinstance(value, Tensor) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_int(name: str, value: Any, least: int) -> None:
    """``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: {value!r} given; give an integer >= {least}")


def _check_number(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: {value!r} given; give a float")


def check_finite(name: str, value: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` is a finite number."""
    _check_number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} given; give a finite float")


def check_size(name: str, value: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` is a finite number >= 0."""
    _check_number(name, value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: {value} given; give a finite float >= 0")


def check_fraction(name: str, value: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` is a number from 0 to 1."""
    _check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: {value} given; give a float from 0 to 1")


def check_one_of(name: str, value: Any, known: Iterable[Any], other: str = "") -> None:
    """``ValueError`` unless ``value`` is one of ``known``; ``other`` says what else would do."""
    known = tuple(known)
    if value not in known:
        names = ", ".join(map(repr, known)) + (f" or {other}" if other else "")
        raise ValueError(f"{name}: {value!r} given; give {'one of ' if len(known) > 1 else ''}{names}")


def check_radius(name: str, rho: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``rho`` can be a radius."""
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"{name}: a tensor of shape {tuple(rho.shape)} given; a radius is a float or 0-dim tensor")
    elif not is_number(rho):
        raise TypeError(f"{name}: {rho!r} given; a radius is a float or a 0-dim tensor")
    check_finite_radius(name, rho)


def check_finite_radius(name: str, rho: float | Tensor) -> None:
    """``ValueError`` for a number that is no radius. A tensor's value is not read: that would sync."""
    if not isinstance(rho, Tensor) and not 0.0 <= rho < math.inf:
        raise ValueError(f"{name}: {rho} given, but a radius is finite and not negative (0 switches SAM off)")
