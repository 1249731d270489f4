"""Raises an exception at a chosen line of what runs, wherever that line is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "lines_of"]


class Interrupted:
    """Within this context the ``number``-th line raises ``error``; counted from 0, in every file and function that is
    entered, the code of the context itself left out.

    Attributes:
        files: of the lines seen so far.
        where: the line that raised.
    """

    def __init__(self, error: type[BaseException], number: int | None) -> None:
        self._error, self._number = error, number
        self.files: list[str] = []
        self.where = "nowhere"

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.files.append(frame.f_code.co_filename)
            if len(self.files) - 1 == self._number:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise self._error
        return self._trace

    def __enter__(self) -> Interrupted:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def lines_of(action: Callable[[], object]) -> list[str]:
    """The files of the lines that ``action`` runs, in their order."""
    with Interrupted(BaseException, None) as seen:
        action()
    return seen.files[:-1]  # without that of __exit__
