"""What a report holds, side by side with another one if wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import _report_figure as _figure
from ._m_sharpness import mean_over_groups
from ._report_numbers import Numbers, Pair
from ._report_rows import Row, finite, m_key, number, settings_lines, table

__all__ = ["Comparison", "Report", "compare"]


@dataclass(frozen=True, eq=False)
class Report(Numbers):
    """What :func:`flatmin.report` found. ``print`` shows a table, :meth:`plot` a figure; ``report["lambda_1"]`` is a
    row.

    Attributes:
        rows: all numbers, with errors and units.
        settings: what was measured how, with the numbers that a budget chose.
        eigenvalues: the largest five.
        density: of all eigenvalues.
        m_sharpness: for each size of groups; the key None is that of all samples as one group.
        pacgen: the metric and its bound.
        plan: numbers of products, probes and draws.
        samples: on how many curvature and sharpness were measured.
    """

    def __str__(self) -> str:
        cells = [
            [r.label, number(r.value), "" if r.error is None else f"± {number(r.error, 2) or '?'}", r.unit, r.note]
            for r in self.rows
        ]
        lines = table(["measure", "value", "error", "unit", "error is"], cells, left=(0, 2, 3, 4))
        return "\n".join([*lines, "", *settings_lines(self.settings)])

    def as_dict(self) -> dict[str, Any]:
        """Everything for ``json.dumps``: plain numbers, strings, lists and dictionaries. What is not finite is None."""
        top, density = self.eigenvalues, self.density
        return {
            "rows": {
                r.key: {
                    "label": r.label,
                    "value": finite(r.value),
                    "error": finite(r.error),
                    "unit": r.unit,
                    "note": r.note,
                }
                for r in self.rows
            },
            "settings": dict(self.settings),
            "eigenvalues": {
                "values": list(map(finite, top.values)),
                "residuals": list(map(finite, top.residuals)),
                "converged": list(top.converged),
                "products": top.products,
            },
            "density": {
                "nodes": [x.tolist() for x in density.nodes],
                "weights": [x.tolist() for x in density.weights],
                "dimension": density.dimension,
            },
            "m_sharpness": [
                {
                    "m": m,
                    "value": finite(s.value),
                    "stderr": finite(s.stderr),
                    "per_group": list(map(finite, s.per_group)),
                    "sizes": list(s.sizes),
                }
                for m, s in self.m_sharpness.items()
            ],
            "pacgen": self.pacgen.as_dict(),
        }

    def plot(self, path: Any = None) -> Any:
        """One figure of panels: fit, eigenvalues, density, m-sharpness, expected sharpness, the bound of PACGen.

        Args:
            path: file to write, in the format of its suffix (png, pdf, svg); None writes none.

        Returns:
            The :class:`matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _figure.draw(self, path)


@dataclass(frozen=True, eq=False)
class Comparison(Pair):
    """Two reports side by side. ``print`` shows a table, :meth:`plot` a figure.

    Attributes:
        reports: the two.
        names: theirs.
        rows: pairs of the rows that both have.
        differences: settings that are not the same, which a fair comparison should have equal.
    """

    def __str__(self) -> str:
        a, b = self.names
        cells = [
            [
                x.label,
                number(x.value),
                _error(x),
                number(y.value),
                _error(y),
                _ratio(x, y),
                number(self.apart(x.key), 2),
                x.unit,
            ]
            for x, y in self.rows
        ]
        head = ["measure", a, "", b, "", f"{b} / {a}", "std. errors apart", "unit"]
        lines = table(head, cells, left=(0, 2, 4, 7))
        for name, (x, y) in self.differences.items():
            lines.append(f"measured differently: {name} {x} ({a}), {y} ({b})")
        return "\n".join(lines)

    def apart(self, key: str) -> float | None:
        """The difference of two rows in units of its standard error; None where that is not known.

        m-sharpness of the same groups is compared group by group: what groups differ by among themselves cancels.
        """
        a, b = (report[key] for report in self.reports)
        for m, s in self.reports[0].m_sharpness.items():
            other = self.reports[1].m_sharpness.get(m)
            if key == m_key(m) and other is not None and s.sizes == other.sizes and len(s.sizes) > 1:
                rises = [y - x for x, y in zip(s.per_group, other.per_group, strict=True)]
                mean, error = mean_over_groups(rises, s.sizes)
                return mean / error if error > 0.0 else None
        if not all(row.error is not None and row.note.startswith("std. error") for row in (a, b)):
            return None
        error = math.hypot(a.error or 0.0, b.error or 0.0)
        return (b.value - a.value) / error if error > 0.0 else None

    def as_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {
            "names": list(self.names),
            "rows": {
                x.key: {
                    "label": x.label,
                    "unit": x.unit,
                    "values": [finite(x.value), finite(y.value)],
                    "errors": [finite(x.error), finite(y.error)],
                    "ratio": finite(y.value / x.value) if x.value else None,
                    "standard errors apart": finite(self.apart(x.key)),
                }
                for x, y in self.rows
            },
            "differences": {name: list(values) for name, values in self.differences.items()},
        }

    def plot(self, path: Any = None) -> Any:
        """One figure: ratios of all positive numbers, densities, and m-sharpness over m. Arguments as of
        :meth:`Report.plot`."""
        return _figure.draw_comparison(self, path)


def compare(a: Report, b: Report, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Two reports side by side: SAM's minimum beside SGD's, or one net at two moments.

    Args:
        a, b: from :func:`flatmin.report`, with equal settings.
        names: to call them in table and figure.
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, Report):
            raise TypeError(f"{name}: a {type(given).__name__} given; give what flatmin.report() returned")
    if len(names) != 2:
        raise ValueError(f"names: {names!r} given; give two")
    pairs = tuple((row, b[row.key]) for row in a if row.key in b)
    apart = {
        name: (value, b.settings.get(name))
        for name, value in a.settings.items()
        if name not in ("seconds", "budget_s") and b.settings.get(name) != value
    }
    return Comparison((a, b), (str(names[0]), str(names[1])), pairs, apart)


def _error(row: Row) -> str:
    return "" if row.error is None else f"± {number(row.error, 2) or '?'}"


def _ratio(a: Row, b: Row) -> str:
    return number(b.value / a.value, 3) if a.value else ""
