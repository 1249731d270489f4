"""The look of the figures: sizes, colours, and lines with 95 % bands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .files import in_one_step
from .intervals import Array, Interval, mean_interval

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise SystemExit(f"error: matplotlib cannot be imported ({error}); pip install matplotlib") from error

__all__ = ["INK", "MaxNLocator", "band", "estimate", "figure", "frame_lines", "in_figure", "save", "shades", "styled"]

INK = "#303030"
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2.0,
}


def figure(width: float, height: float) -> Figure:
    """A figure of its own, without pyplot: needs no display and no global state. Sizes in inches, for a slide."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.get_layout_engine().set(wspace=0.04, hspace=0.04)
    return made


def styled() -> Any:
    """Context in which axes get the style; they take it when they are made."""
    return matplotlib.rc_context(STYLE)


def shades(count: int) -> list[Any]:
    """``count`` colours from dark to light for ordered settings, none too pale for white paper."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.0, 0.88, count)]


def band(axes: Any, x: Sequence[float] | Array, values: Array, color: Any, label: str, log: bool = False) -> None:
    """Mean over the last axis of ``values`` [points, seeds] as a line, its 95 % interval as a band; with ``log`` those
    of the logarithm, on an axis of that scale."""
    mean, low, high = map(np.exp, mean_interval(np.log(values))) if log else mean_interval(values)
    axes.plot(x, mean, "o-", markersize=4, color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if log:
        axes.set_yscale("log")


def estimate(
    axes: Any, at: float, interval: Interval, color: Any, marker: str = "o", across: bool = False, **look: Any
) -> None:
    """A marker, and its interval as a bar: upright at ``at`` on the x axis, or ``across`` at that height."""
    width = look.pop("linewidth", 2.4)
    bar, point = ([interval.low, interval.high], [at] * 2), (interval.value, at)
    axes.plot(*(bar if across else bar[::-1]), color=color, linewidth=width)
    axes.plot(*(point if across else point[::-1]), marker, color=color, **look)


def frame_lines(axes: Any) -> None:
    """Limits from the lines: bands of few seeds can be ten times as wide, and then run off the frame."""
    drawn = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    log = axes.get_yscale() == "log"
    drawn = drawn[np.isfinite(drawn) & ((drawn > 0) | (not log))]
    if len(drawn):
        low, high = (np.log(drawn) if log else drawn).min(), (np.log(drawn) if log else drawn).max()
        pad = 0.15 * (high - low) + 1e-9
        axes.set_ylim(*(np.exp([low - pad, high + pad]) if log else (low - pad, high + pad)))


def in_figure(label: str) -> str:
    """A label as figures write it: with the symbols that a plain table spells out."""
    for plain, symbol in (("rho sqrt(m)", r"$\rho\sqrt{m}$"), ("gamma", r"$\gamma$"), ("sigma", r"$\sigma$")):
        label = label.replace(plain, symbol)
    return label


def save(fig: Figure, path: Path) -> None:
    """Write a PNG in one step."""
    try:
        with in_one_step(path) as partial:
            fig.savefig(partial, dpi=150, format="png")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error})") from error
