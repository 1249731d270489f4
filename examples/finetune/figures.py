"""Curves and confusion matrix of a run, and the comparison of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _common.figures import INK, MaxNLocator, figure, save, styled
from _common.intervals import mean_interval

COLORS = ("#1f77b4", "#d1495b", "#2e933c", "#8a5fbf", "#e08e0b")


def curves(results: Mapping[str, Sequence[dict[str, Any]]], probe: float, noisy: bool, title: str, path: Path) -> None:
    """Loss, accuracy and, under label noise, the share of wrong labels fitted, after every epoch.

    Args:
        results: for each method the results of its seeds; means are drawn, with all seeds as thin lines.
        probe: accuracy of the linear probe, in percent.
    """
    panels = [("test_loss", "test loss (nats)"), ("test_accuracy", "test accuracy (%)")]
    if noisy:
        panels.append(("wrong_fitted", "wrong labels fitted while training (%)"))
    with styled():
        fig = figure(4.6 * len(panels), 4.4)
        fig.suptitle(title)
        for axes, (key, label) in zip(fig.subplots(1, len(panels)), panels, strict=True):
            for color, (name, seeds) in zip(COLORS, results.items(), strict=False):
                values = np.array([[np.nan if e[key] is None else e[key] for e in r["history"]] for r in seeds], float)
                x = np.arange(1, values.shape[1] + 1)
                if len(values) > 1:
                    axes.plot(x, values.T, color=color, linewidth=0.8, alpha=0.4)
                axes.plot(x, values.mean(0), "o-", color=color, label=name, markersize=5)
            if key == "test_accuracy":
                axes.axhline(probe, color=INK, linestyle=":", label=f"linear probe, {probe:.1f} %")
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if key != "wrong_fitted":
                axes.legend()
        save(fig, path)


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """Rows are true classes, columns what the network says, in percent of the row."""
    table = np.array(counts, float)
    shares = 100.0 * table / np.maximum(table.sum(1, keepdims=True), 1.0)
    with styled():
        fig = figure(7.0, 6.2)
        axes = fig.subplots()
        axes.grid(False)
        image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=100.0)
        fig.colorbar(image, ax=axes, label="% of the class")
        ticks = range(len(classes)) if len(classes) <= 40 else []
        axes.set_xticks(ticks, classes if ticks else [], rotation=45, ha="right")
        axes.set_yticks(ticks, classes if ticks else [])
        if len(classes) <= 12:
            for (y, x), share in np.ndenumerate(shares):
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color="white" if share > 60 else INK, size=10)
        axes.set_xlabel("the network says")
        axes.set_ylabel("true class")
        fig.suptitle(title, size=11)
        save(fig, path)


def comparison(results: Mapping[str, Sequence[dict[str, Any]]], probe: float, title: str, path: Path) -> None:
    """Accuracy after the last epoch, and sharpness where it was measured, of every method: seeds, mean, interval."""
    panels: list[tuple[str, Any]] = [("test accuracy, last epoch (%)", lambda r: r["history"][-1]["test_accuracy"])]
    if all(r["sharpness"] for seeds in results.values() for r in seeds):
        panels.append(("m-sharpness, m = 16 (nats)", lambda r: r["sharpness"]["m_sharpness_16"]))
        panels.append((r"largest eigenvalue $\lambda_1$", lambda r: r["sharpness"]["lambda_1"]))
    with styled():
        fig = figure(4.4 * len(panels), 4.4)
        fig.suptitle(title)
        for axes, (label, of) in zip(np.atleast_1d(fig.subplots(1, len(panels))), panels, strict=True):
            for i, (color, seeds) in enumerate(zip(COLORS, results.values(), strict=False)):
                values = np.array([of(r) for r in seeds], float)
                mean, low, high = mean_interval(values)
                axes.plot(np.full(len(values), i) - 0.12, values, "o", color=color, alpha=0.5, markersize=6)
                axes.errorbar(i + 0.12, mean, [[mean - low], [high - mean]], fmt="s", color=color, capsize=5)
            if of is panels[0][1]:
                axes.axhline(probe, color=INK, linestyle=":", label=f"linear probe, {probe:.1f} %")
                axes.legend()
                low, high = axes.get_ylim()  # intervals of two seeds reach beyond all that there is
                axes.set_ylim(max(low, 0.0), min(high, 100.0))
            else:
                axes.set_ylim(bottom=0.0)
            axes.set_xticks(range(len(results)), list(results))
            axes.set_xlim(-0.6, len(results) - 0.4)
            axes.set_ylabel(label)
        save(fig, path)
