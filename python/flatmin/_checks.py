"""Checks of arguments that every side of the package needs: each message names the argument and says what to give."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = ["check_finite_radius", "check_int", "check_one_of", "check_radius", "check_size"]


def check_int(name: str, value: Any, least: int) -> None:
    """``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r} given; give an integer >= {least}")


def check_size(name: str, value: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``value`` is a finite number >= 0."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: {value!r} given; give a float")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: {value} given; give a finite float >= 0")


def check_one_of(name: str, value: Any, known: tuple[Any, ...], other: str = "") -> None:
    """``ValueError`` unless ``value`` is one of ``known``; ``other`` says what else would do."""
    if value not in known:
        names = ", ".join(map(repr, known)) + (f" or {other}" if other else "")
        raise ValueError(f"{name}: {value!r} given; give {'one of ' if len(known) > 1 else ''}{names}")


def check_radius(name: str, rho: Any) -> None:
    """``TypeError`` or ``ValueError`` unless ``rho`` can be a radius."""
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"{name}: a tensor of shape {tuple(rho.shape)} given; a radius is a float or 0-dim tensor")
    elif not isinstance(rho, int | float):
        raise TypeError(f"{name}: {rho!r} given; a radius is a float or a 0-dim tensor")
    check_finite_radius(name, rho)


def check_finite_radius(name: str, rho: float | Tensor) -> None:
    """``ValueError`` for a number that is no radius. A tensor's value is not read: that would sync."""
    if isinstance(rho, int | float) and not 0.0 <= rho < math.inf:
        raise ValueError(f"{name}: {rho} given, but a radius is finite and not negative (0 switches SAM off)")
