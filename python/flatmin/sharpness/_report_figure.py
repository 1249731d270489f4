"""Figures of reports."""

from __future__ import annotations

import math
from typing import Any

from ._landscape_figure import figure_class
from ._report_numbers import Numbers, Pair

__all__ = ["draw", "draw_comparison"]

_BLUE, _ORANGE, _PALE, _YELLOW, _INK = "#33658a", "#f26419", "#86bbd8", "#f6ae2d", "#444444"
_ERROR = {"fmt": "none", "ecolor": "black", "capsize": 4, "linewidth": 1.0}


def draw(found: Numbers, path: Any) -> Any:
    """See :meth:`Report.plot`."""
    figure = figure_class("plot()")(figsize=(13.5, 7.6), dpi=150, layout="constrained")
    axes = figure.subplots(2, 3)
    for panel, axis in zip((_fit, _top, _density, _groups, _expected, _bound), axes.flat, strict=True):
        panel(axis, found)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found.settings['parameters']:,} parameters; sharpness and curvature on {found.samples:,} samples"
    )
    if path is not None:
        figure.savefig(path)
    return figure


def _bars(axis: Any, names: list[str], values: list[float], errors: list[float | None], colours: list[str]) -> None:
    axis.bar(names, values, color=colours, width=0.55)
    known = [0.0 if e is None or math.isnan(e) else e for e in errors[: len(values)]]
    if any(known):
        axis.errorbar(range(len(names)), values, known, **_ERROR)
    for x, (value, error) in enumerate(zip(values, known, strict=True)):
        axis.annotate(f"{value:.3g}", (x, value + error), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axis.margins(y=0.18)
    axis.axhline(0.0, color=_INK, linewidth=0.8)


def _fit(axis: Any, found: Numbers) -> None:
    keys = [key for key in ("train_loss", "test_loss") if key in found]
    _bars(axis, [key.split("_")[0] for key in keys], [found[k].value for k in keys], [None] * 2, [_BLUE, _ORANGE])
    axis.set_xlim(-0.6, len(keys) - 0.4)
    axis.set_ylabel("loss / units of loss_fn")
    accuracies = [f"{k.split('_')[0]} {100.0 * found[k].value:.4g} %" for k in _ACCURACIES if k in found]
    axis.set_title("Fit" + (": accuracy " + ", ".join(accuracies) if accuracies else ""), fontsize=11)


_ACCURACIES = ("train_accuracy", "test_accuracy")


def _top(axis: Any, found: Numbers) -> None:
    top = found.eigenvalues
    at = range(1, len(top.values) + 1)
    axis.bar(at, top.values, color=[_BLUE if done else _PALE for done in top.converged], width=0.55)
    axis.errorbar(at, top.values, top.residuals, **_ERROR)
    axis.axhline(0.0, color=_INK, linewidth=0.8)
    axis.set_xlabel("number" + ("" if all(top.converged) else " (pale: not converged)"))
    axis.set_ylabel("eigenvalue / (loss / weight$^2$)")
    axis.set_title(rf"Largest eigenvalues, $\lambda_1$ = {top.values[0]:.4g}", fontsize=11)


def _density(axis: Any, found: Numbers) -> None:
    _curve(axis, found, _BLUE, None)
    axis.set_title(f"Spectrum, trace {found['trace'].value:.4g}", fontsize=11)


def _curve(axis: Any, found: Numbers, colour: str, label: str | None) -> None:
    at, value, _ = (x.tolist() for x in found.density.on_grid())
    axis.plot(at, value, color=colour, linewidth=1.4, label=label)
    axis.set_yscale("log")
    low, high = 0.1 * max(value) / found.density.dimension, 3.0 * max(value)  # from a tenth of one eigenvalue
    others = axis.get_ylim() if axis.lines[1:] else (low, high)
    axis.set_ylim(min(low, others[0]), max(high, others[1]))
    axis.set_xlabel("eigenvalue / (loss / weight$^2$)")
    axis.set_ylabel("density / (weight$^2$ / loss)")


def _groups(axis: Any, found: Numbers) -> None:
    _over_m(axis, found, _BLUE, None)
    adaptive = ", adaptive" if found.settings["adaptive"] else ""
    axis.set_title(f"m-sharpness at radius {found.settings['rho']:g}{adaptive}", fontsize=11)


def _over_m(axis: Any, found: Numbers, colour: str, label: str | None) -> None:
    points = sorted((found.samples if m is None else m, s.value, s.stderr) for m, s in found.m_sharpness.items())
    m, values, errors = zip(*points, strict=True)
    bars = [0.0 if math.isnan(e) else e for e in errors]
    axis.errorbar(m, values, bars, color=colour, marker="o", markersize=4, capsize=4, label=label)
    axis.set_xscale("log")
    axis.set_xticks(m, [f"{x:,}" for x in m])
    axis.minorticks_off()
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel("m / samples in a group")
    axis.set_ylabel("rise of the loss / units of loss_fn")


def _expected(axis: Any, found: Numbers) -> None:
    rows = [found[key] for key in ("expected_sharpness", "expected_relative_sharpness")]
    names = [f"size {found.settings['scale']:g}", f"size {found.settings['relative_scale']:g} |w|"]
    _bars(axis, names, [r.value for r in rows], [r.error for r in rows], [_BLUE, _PALE])
    axis.set_xlim(-0.6, 1.6)
    axis.set_xlabel("normal noise on the weights")
    axis.set_ylabel("mean rise of the loss / units of loss_fn")
    axis.set_title("Expected sharpness", fontsize=11)


def _bound(axis: Any, found: Numbers) -> None:
    laws = {"uniform": found.pacgen.uniform, "truncated\nnormal": found.pacgen.truncated_normal}
    parts = {
        "training loss": [b.loss for b in laws.values()],
        "rise under noise": [b.rise for b in laws.values()],
        r"divergence / $\eta$": [b.divergence / b.eta for b in laws.values()],
        r"$\eta$ / (2 n)": [b.eta / (2.0 * b.samples) for b in laws.values()],
    }
    bottom = [0.0] * len(laws)
    for (name, heights), colour in zip(parts.items(), (_BLUE, _ORANGE, _PALE, _YELLOW), strict=True):
        axis.bar(list(laws), heights, bottom=bottom, color=colour, width=0.55, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, top in enumerate(bottom):
        axis.annotate(f"{top:.3g}", (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xlim(-0.6, 2.6)
    axis.margins(y=0.15)
    axis.legend(fontsize=8, frameon=False, loc="center right")
    axis.set_ylabel("bound / units of the loss")
    axis.set_title(rf"PACGen: $\Psi$ = {found.pacgen.psi:,.5g} nats", fontsize=11)


def draw_comparison(found: Pair, path: Any) -> Any:
    """See :meth:`Comparison.plot`."""
    figure = figure_class("plot()")(figsize=(14.5, 5.2), dpi=150, layout="constrained")
    ratios, density, groups = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 1.0))
    shown = [(x.label, y.value / x.value) for x, y in found.rows if x.value > 0.0 and y.value > 0.0]
    names, values = [name for name, _ in shown], [value for _, value in shown]
    ratios.hlines(names, 1.0, values, color=_PALE, linewidth=2.0)
    ratios.plot(values, names, "o", color=_BLUE)
    ratios.axvline(1.0, color=_INK, linewidth=0.8)
    ratios.invert_yaxis()
    if max(values) > 10.0 * min(values):
        ratios.set_xscale("log")
    ratios.tick_params(axis="y", labelsize=8)
    ratios.set_xlabel(f"ratio {found.names[1]} / {found.names[0]}")
    for report, name, colour in zip(found.reports, found.names, (_BLUE, _ORANGE), strict=True):
        _curve(density, report, colour, name)
        _over_m(groups, report, colour, name)
    groups.set_ylim(bottom=0.0)
    for axis, title in ((ratios, "Ratios"), (density, "Spectrum"), (groups, "m-sharpness")):
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (density, groups):
        axis.legend(fontsize=9, frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure
