"""A PACGen result as a table, as numbers for JSON, and as a figure."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch

from ._pac_bayes import Bound
from ._pacgen_result import PACGenResult

__all__ = ["as_dict", "plot", "table"]

_SOURCES = {
    "max": "largest difference quotient",
    "quantile": "quantile of the difference quotients",
    "element": "difference quotient of each element",
}
_DIVERGENCE, _TEMPERATURE = "divergence / eta", "eta / (2 n)"
_ROWS = 24  # bars that a figure can hold with legible names


def _lipschitz(result: PACGenResult) -> dict[str, float]:
    """The constant, or what can be said of one for each element in two numbers."""
    if isinstance(result.lipschitz, float):
        return {"value": result.lipschitz}
    flat = torch.cat([t.detach().flatten().cpu() for t in result.lipschitz])
    return {"largest": float(flat.max()), "median": float(flat.median())}


def table(result: PACGenResult) -> str:
    """Rows for the layers, then the totals, then what the bound is made of."""
    rho = ", ".join(f"{name} {value:.4g}" for name, value in _lipschitz(result).items()).removeprefix("value ")
    settings = f"gamma {result.gamma:g}, eps {result.eps:g}" + ", rho sqrt(m)" * result.sqrt_m
    lines = [
        f"PACGen of {result.size:,} parameters on {result.samples:,} samples, {settings}",
        f"curvature H_ii: {result.curvature_source}",
        f"Hessian-Lipschitz constant: {rho} ({_SOURCES.get(result.lipschitz_source, result.lipschitz_source)})",
        "",
    ]
    head = ["parameter", "elements", "Psi / nats", "per element", "capped", "s.e. of Psi", "mean H_ii"]
    head += ["s.e. of mean", "s.e. of H_ii"]
    rows = []
    for layer in result.layers:
        sums = _psi(layer.psi, layer.size, layer.capped)
        mean = [f"{layer.curvature:.3g}", _error(layer.curvature_mean_stderr), _error(layer.curvature_stderr)]
        rows.append([layer.name, f"{layer.size:,}", *sums, _error(layer.psi_stderr), *mean])
    total = ["total", f"{result.size:,}", *_psi(result.psi, result.size, result.capped), _error(result.psi_stderr)]
    total += [f"{result.curvature_mean:.3g}", _error(result.curvature_mean_stderr), ""]
    widths = [max(map(len, column)) for column in zip(head, *rows, total, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines += [_row(head, widths), rule, *(_row(row, widths) for row in rows), rule, _row(total, widths), ""]
    if result.psi_stderr is not None:
        lines.append(
            "s.e.: standard errors over the samples of the curvature: of Psi (at most, to first order, rho as it"
        )
        lines += ["is), of the mean of H_ii over a tensor, and of a single H_ii (root mean square).", ""]
    lines.append(f"training loss                  {result.training_loss:.6g}")
    if result.sharpness is not None:
        rise = result.sharpness
        error = f" ± {rise.stderr:.2g} ({rise.samples} draws" if rise.samples > 1 else " (one draw"
        lines.append(f"expected sharpness             {rise.value:.4g}{error} of the uniform noise)")
    lines.append(f"bound, uniform noise           {_terms(result.uniform)}")
    lines.append(f"bound, truncated normal noise  {_terms(result.truncated_normal)}")
    lines.append(
        f"Losses in units of loss_fn. The bound is one for losses in [0, 1], with probability {1.0 - result.delta:g}."
    )
    return "\n".join(lines)


def _error(stderr: float | None) -> str:
    return "-" if stderr is None or math.isnan(stderr) else f"{stderr:.2g}"


def _psi(psi: float, size: int, capped: float) -> list[str]:
    return [f"{psi:.6g}", f"{psi / size:.4g}", f"{100.0 * capped:.1f} %"]


def _row(cells: list[str], widths: list[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()


def _parts(bound: Bound) -> dict[str, float]:
    return {
        "training loss": bound.loss,
        "rise under noise": bound.rise,
        _DIVERGENCE: bound.divergence / bound.eta,
        _TEMPERATURE: bound.eta / (2.0 * bound.samples),
    }


def _terms(bound: Bound) -> str:
    parts = " + ".join(f"{value:.4g} ({name})" for name, value in _parts(bound).items())
    return f"{bound.value:.6g} = {parts}, eta = {bound.eta:.4g}"


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def as_dict(result: PACGenResult) -> dict[str, Any]:
    """Plain numbers, strings, lists and dictionaries. None stands for what is not finite or not known."""
    layers = [
        {
            "name": layer.name,
            "size": layer.size,
            "psi": _finite(layer.psi),
            "capped": layer.capped,
            "curvature": _finite(layer.curvature),
            "curvature_stderr": _finite(layer.curvature_stderr),
            "curvature_mean_stderr": _finite(layer.curvature_mean_stderr),
            "psi_stderr": _finite(layer.psi_stderr),
        }
        for layer in result.layers
    ]
    sharpness = result.sharpness
    return {
        "psi": _finite(result.psi),
        "psi_stderr": _finite(result.psi_stderr),
        "curvature_mean": _finite(result.curvature_mean),
        "curvature_mean_stderr": _finite(result.curvature_mean_stderr),
        "layers": layers,
        "size": result.size,
        "samples": result.samples,
        "capped": result.capped,
        "curvature_source": result.curvature_source,
        "lipschitz": {name: _finite(value) for name, value in _lipschitz(result).items()},
        "lipschitz_source": result.lipschitz_source,
        "training_loss": _finite(result.training_loss),
        "uniform": {name: _finite(value) for name, value in result.uniform._asdict().items()},
        "truncated_normal": {name: _finite(value) for name, value in result.truncated_normal._asdict().items()},
        "sharpness": None if sharpness is None else {k: _finite(v) for k, v in sharpness._asdict().items()},
        "gamma": result.gamma,
        "eps": result.eps,
        "sqrt_m": result.sqrt_m,
        "delta": result.delta,
    }


def plot(result: PACGenResult, path: Any = None) -> Any:
    """Left the layers' parts of the metric, right the terms of both bounds. See :meth:`flatmin.PACGen.plot`."""
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plot() draws with matplotlib: pip install matplotlib") from error
    rows = [(layer.name, layer.psi, layer.size) for layer in result.layers]
    if len(rows) > _ROWS:
        # the largest keep their place, the rest become one bar
        kept = sorted(sorted(range(len(rows)), key=lambda i: -abs(rows[i][1]))[: _ROWS - 1])
        rest = [row for i, row in enumerate(rows) if i not in set(kept)]
        others = (f"{len(rest)} others", math.fsum(r[1] for r in rest), sum(r[2] for r in rest))
        rows = [rows[i] for i in kept] + [others]
    # no pyplot: neither its backend nor its current figure is ours to change
    figure = figure_module.Figure(figsize=(11.0, max(4.2, 1.6 + 0.26 * len(rows))), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bars = left.barh([row[0] for row in rows], [row[1] for row in rows], color="#33658a", height=0.72)
    left.bar_label(bars, [f"{psi / size:.2f}" for _, psi, size in rows], padding=4, fontsize=8, color="#444444")
    left.invert_yaxis()
    left.margins(x=0.14)
    left.axvline(0.0, color="#444444", linewidth=0.8)
    left.set_xlabel(r"contribution to $\Psi$ / nats  (beside the bars: nats per parameter)")
    left.set_title(rf"PACGen: $\Psi$ = {result.psi:,.6g} nats, {result.size:,} parameters", fontsize=11)
    left.tick_params(axis="y", labelsize=8 if len(rows) > 12 else 9)
    laws = {"uniform": result.uniform, "truncated\nnormal": result.truncated_normal}
    bottom = [0.0] * len(laws)
    symbols = {_DIVERGENCE: r"divergence / $\eta$", _TEMPERATURE: r"$\eta$ / (2 n)"}
    colours = ("#33658a", "#f26419", "#86bbd8", "#f6ae2d")
    for name, colour in zip(_parts(result.uniform), colours, strict=True):
        heights = [_parts(bound)[name] for bound in laws.values()]
        right.bar(list(laws), heights, bottom=bottom, color=colour, width=0.55, label=symbols.get(name, name))
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, (top, bound) in enumerate(zip(bottom, laws.values(), strict=True)):
        text = f"{bound.value:.3g}\n" + rf"at $\eta$ = {bound.eta:{',.0f' if bound.eta >= 100.0 else '.3g'}}"
        right.annotate(text, (x, top), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    if result.sharpness is not None:
        measured = result.training_loss + result.sharpness.value
        half = 0.0 if math.isnan(result.sharpness.stderr) else result.sharpness.stderr
        right.errorbar(
            [0], [measured], [half], fmt="D", color="black", capsize=4, markersize=5,
            label="loss under the noise, sampled",
        )  # fmt: skip
    right.set_xlim(-0.6, len(laws) - 0.4)
    right.margins(y=0.2)
    right.set_ylabel("bound / units of the loss")
    right.set_xlabel("distribution of the noise")
    right.set_title(f"PAC-Bayes bound (probability {1.0 - result.delta:g}), n = {result.samples:,}", fontsize=11)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower right", ncols=5, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path)
    return figure
