"""A landscape: values, a file that grows with them, and figures."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import _landscape_figure as _figure
from ._landscape_grid import Grid

__all__ = ["Landscape"]


@dataclass(eq=False)
class Landscape(Grid):
    """The loss along a line or over a plane through the weights, found by :func:`line` and :func:`plane`.

    Attributes:
        axes: the coordinates of the grid, one tuple for each axis. The weights are at 0.
        labels: of the axes, with their units.
        values: ``(loss, accuracy)`` of each point, the last axis running fastest; None where it is not evaluated yet.
            The loss is in units of ``loss_fn``, the accuracy in [0, 1]; None where the outputs are no scores of
            classes.
        marks: names of points and their coordinates.
        batch_norm: "keep" or "recompute".
        identity: digest of weights and directions, by which a file knows whether it can be continued.
    """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON. An interrupted write leaves the old file."""
        path = Path(path)
        text = json.dumps({"format": "flatmin landscape 1"} | asdict(self))
        beside = path.with_name(path.name + ".part")
        beside.write_text(text)
        beside.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Read what :meth:`save` wrote. ``ValueError`` for any other file."""
        try:
            found = json.loads(Path(path).read_text())
            if found.pop("format") != "flatmin landscape 1":
                raise KeyError
            new = cls(
                axes=tuple(map(tuple, found["axes"])),
                labels=tuple(found["labels"]),
                values=[None if v is None else (v[0], v[1]) for v in found["values"]],
                marks={name: tuple(at) for name, at in found["marks"].items()},
                batch_norm=found["batch_norm"],
                identity=found["identity"],
            )
            if len(new.values) != math.prod(new.shape):
                raise KeyError
            return new
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, OSError) as error:
            if isinstance(error, OSError) and not Path(path).is_dir():
                raise
            raise ValueError(f"path: {os.fspath(path)} holds no landscape; give a file that save() wrote") from error

    def plot(self, path: Any = None, *, kind: str = "contour", log: bool | None = None) -> Any:
        """A figure: loss and accuracy along a line, or over a plane.

        Args:
            path: file to write, in the format of its suffix (png, pdf, svg); None writes none.
            kind: of a plane: "contour", or "surface" for one in three dimensions.
            log: logarithmic scale of the loss; None takes it where the loss is above 0 and spans a factor above 30.

        Returns:
            The :class:`matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return _figure.draw(self, path, kind, log)
