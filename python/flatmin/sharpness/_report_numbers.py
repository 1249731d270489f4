"""What a report holds, and a comparison of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..curvature._density import SpectralDensity
from ..curvature._lanczos import Eigenvalues
from ._m_sharpness import MSharpness
from ._pacgen import PACGen
from ._plan import Plan
from ._report_rows import Row

__all__ = ["Numbers", "Pair"]


@dataclass(frozen=True, eq=False)
class Numbers:
    """What :class:`Report` holds; its attributes are described there."""

    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(repr=False)
    eigenvalues: Eigenvalues = field(repr=False)
    density: SpectralDensity = field(repr=False)
    m_sharpness: dict[int | None, MSharpness] = field(repr=False)
    pacgen: PACGen = field(repr=False)
    plan: Plan = field(repr=False)
    samples: int = field(repr=False)

    def __getitem__(self, key: str) -> Row:
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(f"{key!r}; the rows are {', '.join(row.key for row in self.rows)}")

    def __contains__(self, key: str) -> bool:
        return any(row.key == key for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@dataclass(frozen=True, eq=False)
class Pair:
    """What :class:`Comparison` holds; its attributes are described there."""

    reports: tuple[Numbers, Numbers]
    names: tuple[str, str]
    rows: tuple[tuple[Row, Row], ...] = field(repr=False)
    differences: dict[str, tuple[Any, Any]]
