"""Numbers with their errors and units, as lines of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Row", "finite", "m_key", "number", "settings_lines", "table"]


class Row(NamedTuple):
    """One number of a report.

    Attributes:
        key: its name in :meth:`Report.as_dict` and ``report[key]``.
        label: its name for people.
        value: the number.
        error: its error, None where there is none or it is not known.
        unit: "" for a pure number; "loss" is the unit of ``loss_fn``.
        note: what the error is, and what else is to be said.
    """

    key: str
    label: str
    value: float
    error: float | None
    unit: str
    note: str = ""


def m_key(m: int | None) -> str:
    """The key of the row of an m-sharpness."""
    return f"m_sharpness_{'all' if m is None else m}"


def finite(x: float | None) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return x if x is not None and math.isfinite(x) else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of a table; the columns in ``left`` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return [line(head), rule, *map(line, rows)]


def number(x: float | None, digits: int = 5) -> str:
    if x is None or math.isnan(x):
        return ""
    return f"{x:,.0f}" if abs(x) >= 1e4 and math.isfinite(x) and x == int(x) else f"{x:.{digits}g}"


def settings_lines(settings: dict[str, Any]) -> list[str]:
    """``name value`` pairs, as many on a line as fit."""
    lines, here = [], ""
    for name, value in settings.items():
        item = f"{name}: {value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{name}: {value}"
        if here and len(here) + len(item) > 108:
            lines.append(here)
            here = ""
        here += ("; " if here else "") + item
    return [*lines, here]
