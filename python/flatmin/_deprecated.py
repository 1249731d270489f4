"""Old spellings: accepted for one version, with a ``DeprecationWarning`` that says the new one (docs/glossary.md)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["renamed_arguments", "renamed_value"]

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keywords by their old names: ``@renamed_arguments(law="distribution")``.

    ``TypeError`` where both are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old}: the old name of {new}, and both are given; give {new} alone")
                _warn(f"{old}=", f"{new}=", stacklevel=3)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_value(name: str, value: Any, names: Mapping[str, str], *, stacklevel: int = 2) -> Any:
    """``value`` of the argument ``name``, by its new name if it has an old one. The default ``stacklevel`` warns the
    caller of the function that calls this one."""
    if not isinstance(value, str) or value not in names:
        return value
    _warn(f"{name}={value!r}", repr(names[value]), stacklevel=stacklevel + 2)
    return names[value]


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} is now {new}; the old spelling goes with the next version", DeprecationWarning, stacklevel=stacklevel
    )
