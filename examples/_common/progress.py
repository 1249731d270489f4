"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm: smooth in a terminal, a line every ten seconds in a log file."""
    return tqdm(items, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)
