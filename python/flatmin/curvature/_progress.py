"""A progress bar for passes over the data."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["ProgressBar"]


class ProgressBar:
    """tqdm's, if tqdm is here and a bar is wanted.

    Args:
        name: shown before it.
        total: number of batches; None where nobody knows.
        progress: True or False; None shows a bar where stderr is a terminal, after two seconds.
    """

    def __init__(self, name: str, total: int | None, progress: bool | None) -> None:
        self._bar: Any = None
        if progress is False:
            return
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            return
        # disable=None asks whether stderr is a terminal
        quiet = {"disable": None, "delay": 2.0} if progress is None else {}
        self._bar = tqdm(total=total, desc=name, unit="batch", leave=False, **quiet)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        """Show ``text`` beside it."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
