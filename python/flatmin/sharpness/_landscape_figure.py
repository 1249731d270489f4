"""Figures of landscapes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .._checks import check_one_of
from ._landscape_grid import Grid

__all__ = ["draw", "figure_class"]

_BLUE, _ORANGE, _INK = "#33658a", "#f26419", "#444444"
_LEVELS = 14  # lines that can still be told apart


def figure_class(of: str) -> Any:
    """:class:`matplotlib.figure.Figure`: no pyplot, whose backend and current figure are the user's."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(f"{of} draws with matplotlib: pip install matplotlib") from error


def draw(found: Grid, path: Any, kind: str, log: bool | None) -> Any:
    """See :meth:`Landscape.plot`."""
    check_one_of("kind", kind, ("contour", "surface"))
    new = figure_class("plot()")
    loss = found.loss
    finite = loss[loss.isfinite()]
    if not len(finite):
        raise ValueError("plot: no point of the landscape has a finite loss; evaluate it first")
    if log is None:
        log = bool(finite.min() > 0.0) and float(finite.max()) > 30.0 * float(finite.min())
    if len(found.axes) == 1:
        figure = new(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        _line(figure.subplots(), found, log)
    elif kind == "contour":
        accuracy = found.accuracy
        width = 6.2 if accuracy is None else 11.8
        figure = new(figsize=(width, 5.0), dpi=150, layout="constrained")
        axes = figure.subplots(1, 1 if accuracy is None else 2, squeeze=False)[0]
        _contour(figure, axes[0], found, loss, "loss / units of loss_fn", log)
        if accuracy is not None:
            _contour(figure, axes[1], found, 100.0 * accuracy, "accuracy / %", False)
    else:
        figure = new(figsize=(7.6, 6.2), dpi=150, layout="constrained")
        _surface(figure, found, loss, log)
    if path is not None:
        figure.savefig(path)
    return figure


def _line(axis: Any, found: Grid, log: bool) -> None:
    x, loss, accuracy = found.axes[0], found.loss, found.accuracy
    axis.plot(x, loss.tolist(), color=_BLUE, marker="o", markersize=3, label="loss")
    axis.set_xlabel(found.labels[0])
    axis.set_ylabel("loss / units of loss_fn", color=_BLUE)
    if log:
        axis.set_yscale("log")
    if accuracy is not None:
        right = axis.twinx()
        right.plot(x, (100.0 * accuracy).tolist(), color=_ORANGE, marker="s", markersize=3, label="accuracy")
        right.set_ylabel("accuracy / %", color=_ORANGE)
    for name, (at,) in found.marks.items():
        axis.axvline(at, color=_INK, linewidth=0.8, linestyle="--")
        axis.annotate(
            name, (at, 1.0), (3, -4), xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
            fontsize=8, color=_INK,
        )  # fmt: skip
    axis.set_title("Loss along a line" + _note(found), fontsize=11)


def _note(found: Grid) -> str:
    return ", BatchNorm's statistics recomputed" if found.batch_norm == "recompute" else ""


def _masked(z: Tensor) -> Any:
    """Rows are the second axis, as matplotlib has it; what is not finite is left out."""
    numpy = importlib.import_module("numpy")
    return numpy.ma.masked_invalid(z.T.numpy())


def _contour(figure: Any, axis: Any, found: Grid, z: Tensor, label: str, log: bool) -> None:
    values = _masked(z)
    low, high = float(values.min()), float(values.max())
    options: dict[str, Any] = {"cmap": "viridis"}
    flat = not high > low
    if not flat:
        spaced = torch.logspace if log else torch.linspace
        ends = torch.tensor([low, high], dtype=torch.float64)
        first, last = (ends.log10() if log else ends).tolist()
        options["levels"] = spaced(first, last, _LEVELS, dtype=torch.float64).tolist()
    if log:
        options["norm"] = importlib.import_module("matplotlib.colors").LogNorm(low, high)
    filled = axis.contourf(*found.axes, values, **options)
    bar = figure.colorbar(filled, ax=axis, label=label)
    if not flat:
        lines = axis.contour(*found.axes, values, levels=options["levels"][1:-1], colors="white", linewidths=0.6)
        axis.clabel(lines, lines.levels[::2], fontsize=7, fmt="%.3g")
        bar.set_ticks(options["levels"][::3], labels=[f"{level:.3g}" for level in options["levels"][::3]])
        bar.ax.minorticks_off()
    axis.set_xlabel(found.labels[0])
    axis.set_ylabel(found.labels[1])
    for name, at in found.marks.items():
        axis.plot(*at, marker="o", color="white", markeredgecolor="black", markersize=6)
        axis.annotate(
            name, at, (6, 6), textcoords="offset points", fontsize=8, color="black",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axis.set_title(label.split(" /")[0].capitalize() + " over a plane" + _note(found), fontsize=11)


def _surface(figure: Any, found: Grid, loss: Tensor, log: bool) -> None:
    numpy = importlib.import_module("numpy")
    axis = figure.add_subplot(projection="3d")
    x, y = numpy.meshgrid(*found.axes)
    z = _masked(loss.log10() if log else loss).filled(numpy.nan)
    drawn = axis.plot_surface(
        x, y, z, cmap="viridis", rcount=len(y), ccount=len(y[0]), linewidth=0.2, edgecolor="#ffffff40",
        vmin=float(numpy.nanmin(z)), vmax=float(numpy.nanmax(z)),
    )  # fmt: skip
    axis.contour(x, y, numpy.ma.masked_invalid(z), levels=10, zdir="z", offset=float(numpy.nanmin(z)), cmap="viridis")
    label = r"$\log_{10}$ (loss / units of loss_fn)" if log else "loss / units of loss_fn"
    axis.set_xlabel(found.labels[0])
    axis.set_ylabel(found.labels[1])
    axis.set_zlabel(label)
    figure.colorbar(drawn, ax=axis, label=label, shrink=0.6, pad=0.1)
    axis.view_init(elev=32.0, azim=-55.0)
    axis.set_title("Loss over a plane" + _note(found), fontsize=11)
