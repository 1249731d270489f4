"""Hypothesis, for tests that draw their inputs: ``from drawing import given, st``.

Where it is not installed, as on a machine with a GPU and no package index, a test that draws is left out and counted
like any other test whose part is missing; the module that holds it can still be collected, and its other tests run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

HYPOTHESIS = find_spec("hypothesis") is not None

if HYPOTHESIS:
    from hypothesis import given
    from hypothesis import strategies as st
else:

    class _NoStrategy:
        """Any strategy, and whatever is made of it: nothing is drawn from it."""

        def __getattr__(self, name: str) -> _NoStrategy:
            return self

        def __call__(self, *args: Any, **options: Any) -> _NoStrategy:
            return self

    st = _NoStrategy()  # type: ignore[assignment]

    def given(*args: Any, **options: Any) -> Callable[[Any], Any]:  # type: ignore[no-redef]
        return pytest.mark.requires("hypothesis")


__all__ = ["HYPOTHESIS", "given", "st"]
