"""The tables and figures of cifar.py, from the JSON of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from _common.errors import UsageError
from _common.figures import INK, MaxNLocator, band, figure, save, styled
from _common.intervals import Interval, mean_of

LABELS = {
    "sgd": "SGD",
    "mixup": "Mixup",
    "sam": "SAM",
    "bootstrap+sgd": "bootstrap + SGD",
    "bootstrap+mixup": "bootstrap + Mixup",
    "bootstrap+sam": "bootstrap + SAM",
}
COLOURS = {"sgd": "#7f7f7f", "mixup": "#33658a", "sam": "#c1440e"}
VALUES = {
    "last": "Test accuracy at the last epoch, %",
    "best": "Test accuracy at the best epoch, %",
    "fitted": "Wrong labels fitted at the end, %",
    "recovered": "Images with a wrong label that are given the right class at the end, %",
    "labels_right": "Training labels that are right, %",
}
CHANCE = 10.0  # percent of ten classes


class Table(NamedTuple):
    """Finished runs by noise and method, each with its results by seed."""

    noises: list[float]
    methods: list[str]
    runs: dict[tuple[float, str], dict[int, dict[str, Any]]]

    def values(self, noise: float, method: str, key: str) -> dict[int, float]:
        """By seed; NaN for what a run without wrong labels does not have."""
        found = self.runs.get((noise, method), {})
        return {seed: math.nan if r[key] is None else float(r[key]) for seed, r in found.items()}

    def interval(self, noise: float, method: str, key: str) -> Interval:
        return mean_of(list(self.values(noise, method, key).values()))

    def ahead(self, noise: float, method: str, key: str) -> Interval:
        """By how much ``method`` is above SGD, seed by seed: a paired difference."""
        mine, sgd = self.values(noise, method, key), self.values(noise, "sgd", key)
        return mean_of([mine[seed] - sgd[seed] for seed in mine if seed in sgd])

    def as_dict(self) -> dict[str, Any]:
        return {
            key: {
                f"{noise:g}": {
                    m: self.interval(noise, m, key)._asdict()
                    | {"seeds": sorted(self.runs[noise, m]), "ahead_of_sgd": self.ahead(noise, m, key)._asdict()}
                    for m in self.methods
                    if (noise, m) in self.runs
                }
                for noise in self.noises
            }
            for key in VALUES
        }


def tabulate(results: Sequence[dict[str, Any]], methods: Sequence[str]) -> Table:
    """Runs of one folder have one size: mixing sizes is an error."""
    runs: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for key in ("train", "test", "depth", "width", "shrink", "crop", "kind", "batch", "lr", "weight_decay"):
        if len(found := {result["settings"][key] for result in results}) > 1:
            raise UsageError(f"runs with {key} {' and '.join(map(str, sorted(found)))} lie in one folder; give another "
                             "--out, or delete them")  # fmt: skip
    for result in results:
        s = result["settings"]
        runs.setdefault((s["noise"], s["method"]), {})[s["seed"]] = result
    budgets = {r["settings"]["epochs"] * r["settings"]["passes"] for r in results}
    if len(budgets) > 1:
        raise UsageError("runs of different lengths lie in one folder; give another --out, or delete them")
    noises = sorted({noise for noise, _ in runs})
    return Table(noises, [m for m in methods if any((n, m) in runs for n in noises)], runs)


def report(table: Table) -> str:
    """Markdown: a table for each of VALUES, and the paired differences to SGD."""
    some = next(iter(next(iter(table.runs.values())).values()))["settings"]
    counts = sorted({len(seeds) for seeds in table.runs.values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    side = 32 // some["shrink"]
    lines = [
        f"ResNet-{some['depth']} of width {some['width']}, images of {side}x{side}; {some['train']} training and "
        f"{some['test']} test images; {some['epochs'] * some['passes']} gradients for each image; {seeds} seeds; "
        "95 % intervals over seeds.",
    ]
    head = [
        "| | " + " | ".join(f"{100 * noise:g} %" for noise in table.noises) + " |",
        "|---" * (len(table.noises) + 1) + "|",
    ]
    for key, title in VALUES.items():
        lines += ["", f"### {title}", "", *head]
        for method in table.methods:
            cells = [f"{table.interval(noise, method, key):.1f}" for noise in table.noises]
            lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    others = [method for method in table.methods if method != "sgd"]
    for key in ("last", "best") if "sgd" in table.methods and others else ():
        lines += ["", f"### {VALUES[key].split(',')[0]}: points above SGD, paired by seed", "", *head]
        for method in others:
            cells = [f"{table.ahead(noise, method, key):+.1f}" for noise in table.noises]
            lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _style(method: str) -> dict[str, Any]:
    bootstrap = method.startswith("bootstrap+")
    return {"color": COLOURS[method.removeprefix("bootstrap+")], "linestyle": "--" if bootstrap else "-"}


def plot_summary(table: Table, path: Path) -> None:
    """Last and best accuracy, and wrong labels fitted, over the noise; bars are 95 % intervals."""
    with styled():
        fig = figure(15.0, 5.0)
        panels = fig.subplots(1, 3)
        panels[1].sharey(panels[0])
        shift = 4.0 / len(table.methods)  # percent points of noise, so that bars stand side by side
        for axes, key in zip(panels, ("last", "best", "fitted"), strict=True):
            for m, method in enumerate(table.methods):
                found = [table.interval(noise, method, key) for noise in table.noises]
                x = [100 * noise + shift * (m - (len(table.methods) - 1) / 2) for noise in table.noises]
                style = _style(method)
                marker = "s" if style["linestyle"] == "--" else "o"
                axes.plot(x, [i.value for i in found], marker, markersize=6, label=LABELS[method], **style)
                axes.vlines(x, [i.low for i in found], [i.high for i in found], color=style["color"], linewidth=1.4)
            axes.axhline(CHANCE, color=INK, linewidth=0.8, linestyle=":", label="chance")
            axes.set_xticks([100 * noise for noise in table.noises])
            axes.set_xlabel("wrong training labels, %")
            axes.set_title(VALUES[key].removesuffix(", %"))
            values = [table.interval(n, m, key).value for n in table.noises for m in table.methods]
            axes.set_ylim(0, 1.12 * max([CHANCE, *(v for v in values if math.isfinite(v))]))
        top = max(axes.get_ylim()[1] for axes in panels[:2])
        panels[0].set_ylim(0, top)
        panels[0].set_ylabel("%")
        handles, labels = panels[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(fig, path)


def plot_curves(table: Table, path: Path) -> None:
    """Test accuracy and wrong labels fitted during training, a column for each noise; bands are 95 % intervals."""
    with styled():
        fig = figure(4.2 * len(table.noises) + 1.0, 8.0)
        grid = fig.subplots(2, len(table.noises), sharex=True, sharey="row", squeeze=False)
        for row, (key, title) in enumerate((("accuracy", "test accuracy, %"), ("fitted", "wrong labels fitted, %"))):
            highest = CHANCE
            for axes, noise in zip(grid[row], table.noises, strict=True):
                drawn: list[float] = []
                for method in table.methods:
                    results = list(table.runs.get((noise, method), {}).values())
                    if not results:
                        continue
                    rows = [[e for e in r["epochs"] if e.get(key) is not None] for r in results]
                    if not rows[0]:
                        continue
                    passes = [e["epoch"] * results[0]["settings"]["passes"] for e in rows[0]]
                    values = np.array([[e[key] for e in r] for r in rows]).T
                    band(axes, passes, values, _style(method)["color"], LABELS[method])
                    axes.get_lines()[-1].set(linestyle=_style(method)["linestyle"], markersize=3)
                    drawn += values.ravel().tolist()
                axes.axhline(CHANCE, color=INK, linewidth=0.8, linestyle=":", label="chance")
                highest = max([highest, *drawn])
                axes.set_ylim(0, 1.08 * highest)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                if row == 0:
                    axes.set_title(f"{100 * noise:g} % wrong")
                else:
                    axes.set_xlabel("gradients for each image")
            grid[row][0].set_ylabel(title)
        handles, labels = grid[0][0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(fig, path)
