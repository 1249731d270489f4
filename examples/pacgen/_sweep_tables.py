"""What the runs of sweeps.py say: tables of a sweep, correlations with the gap, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _measures import MEASURES

from _common.errors import UsageError
from _common.figures import INK, MaxNLocator, band, estimate, figure, frame_lines, in_figure, save, shades, styled
from _common.images import TITLES
from _common.intervals import Array, Interval, Resamples, at_level, common_levels

RATE, BATCH = 0.1, 256  # what the sweep over the other one holds fixed
LEVELS = 6  # training losses at which settings are compared


class Sweep(NamedTuple):
    """One task, and the setting that varies: "batch" or "lr"."""

    task: str
    varied: str

    @property
    def name(self) -> str:
        return f"{self.task}-{self.varied}"

    @property
    def title(self) -> str:
        fixed = f"learning rate {RATE:g}" if self.varied == "batch" else f"batch size {BATCH}"
        return f"{TITLES[self.task]}, SGD, {fixed}"

    def label(self, value: float) -> str:
        return f"batch {value:g}" if self.varied == "batch" else f"rate {value:g}"

    def holds(self, settings: dict[str, Any]) -> bool:
        """Whether a run belongs here. The run at the fixed values of both belongs to both sweeps of its task."""
        fixed = settings["lr"] == RATE if self.varied == "batch" else settings["batch"] == BATCH
        return settings["task"] == self.task and fixed


SWEEPS = {sweep.name: sweep for sweep in (Sweep(t, v) for t in ("mnist", "cifar10") for v in ("batch", "lr"))}


class Table(NamedTuple):
    """The runs of one sweep as arrays [settings, seeds, measured epochs]; NaN for a run that is missing."""

    sweep: Sweep
    values: list[float]  # of the varied setting
    seeds: list[int]
    epochs: list[int]
    columns: dict[str, Array]

    def flat(self, key: str) -> Array:
        """[runs, epochs]"""
        return self.columns[key].reshape(-1, len(self.epochs))


def tabulate(sweep: Sweep, results: Sequence[dict[str, Any]]) -> Table | None:
    """None if there are not two settings to compare."""
    results = [result for result in results if sweep.holds(result["settings"])]
    values = sorted({result["settings"][sweep.varied] for result in results})
    seeds = sorted({result["settings"]["seed"] for result in results})
    if len(values) < 2:
        return None
    epochs = [row["epoch"] for row in results[0]["epochs"]]
    keys = [key for key in results[0]["epochs"][0] if key not in ("epoch", "seconds")]
    columns = {key: np.full((len(values), len(seeds), len(epochs)), np.nan) for key in keys}
    for result in results:
        if [row["epoch"] for row in result["epochs"]] != epochs:
            raise UsageError("runs of different lengths lie in one folder; give another --out, or delete them")
        place = values.index(result["settings"][sweep.varied]), seeds.index(result["settings"]["seed"])
        for key in keys:
            columns[key][place] = np.array([row[key] for row in result["epochs"]], float)
    return Table(sweep, values, seeds, epochs, columns)


class Correlations(NamedTuple):
    """Of each measure with the gap, at each point (an epoch, or a training loss)."""

    points: list[float]
    runs: list[int]
    measures: dict[str, list[Interval]]
    ahead: dict[str, list[Interval]]  # by how much PACGen's is larger

    def as_dict(self) -> dict[str, Any]:
        return {
            "points": self.points,
            "runs": self.runs,
            "correlation": {k: [i._asdict() for i in v] for k, v in self.measures.items()},
            "pacgen_less_measure": {k: [i._asdict() for i in v] for k, v in self.ahead.items()},
        }


def _correlations(points: Sequence[float], gaps: Sequence[Array], measures: dict[str, list[Array]]) -> Correlations:
    """``gaps`` and each measure: [settings, seeds] at every point."""
    found: dict[str, list[Interval]] = {key: [] for key in measures}
    ahead: dict[str, list[Interval]] = {key: [] for key in measures if key != "psi"}
    runs = []
    for i, gap in enumerate(gaps):
        valid = np.isfinite(gap) & np.all([np.isfinite(values[i]) for values in measures.values()], axis=0)
        resamples = Resamples(valid)
        runs.append(resamples.runs)
        for key, values in measures.items():
            found[key].append(resamples.correlation(values[i], gap))
            if key != "psi":
                ahead[key].append(resamples.difference(measures["psi"][i], values[i], gap))
    return Correlations([float(p) for p in points], runs, found, ahead)


def at_equal_epoch(table: Table) -> Correlations:
    """Across the settings, at every measured epoch."""
    indices = range(len(table.epochs))
    measures = {key: [table.columns[key][..., i] for i in indices] for key in MEASURES}
    return _correlations(table.epochs, [table.columns["gap"][..., i] for i in indices], measures)


def at_equal_loss(table: Table) -> Correlations:
    """Across the settings, where each run's training loss first falls to a level; interpolated between epochs."""
    losses = table.flat("train_loss")
    levels = common_levels(losses, LEVELS)

    def crossing(key: str) -> list[Array]:
        shape = table.columns[key].shape[:2]
        return [at_level(level, losses, table.flat(key)).reshape(shape) for level in levels]

    return _correlations(levels, crossing("gap"), {key: crossing(key) for key in MEASURES})


# ---- figures ----


def plot_sweep(table: Table, path: Path) -> None:
    """Training loss, gap and PACGen by epoch, a line for each setting."""
    panels = {
        "train_loss": "training loss (nats)",
        "gap": "gap: test - training loss (nats)",
        "psi": r"PACGen $\Psi$ (nats)",
        "psi_sqrt_m": r"PACGen $\Psi$, $\rho\sqrt{m}$ (nats)",
    }
    with styled():
        fig = figure(17, 4.8)
        fig.suptitle(f"{table.sweep.title}: mean of {len(table.seeds)} seeds, band: 95 % interval", fontsize=14)
        colors = shades(len(table.values))
        for axes, (key, label) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
            for value, rows, color in zip(table.values, table.columns[key], colors, strict=True):
                band(axes, table.epochs, rows.T, color, table.sweep.label(value), log=key == "train_loss")
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            frame_lines(axes)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside right center")
        save(fig, path)


def plot_by_point(found: Sequence[tuple[Table, Correlations, Correlations]], path: Path) -> None:
    """Correlation of every measure at every epoch and at every training loss; PACGen with its band."""
    with styled():
        fig = figure(4.4 * len(found) + 2.6, 8)
        fig.suptitle("Spearman rank correlation with the gap\nband: 95 % bootstrap interval of PACGen")
        grid = fig.subplots(2, len(found), sharey=True, squeeze=False)
        colors = dict(zip(MEASURES, ("C3", "C1", "C4", "C0", "C2", "C5", "C7"), strict=True))
        for column, (table, epoch, loss) in enumerate(found):
            for axes, what, name in zip(grid[:, column], (epoch, loss), ("epoch", "training loss (nats)"), strict=True):
                for key, label in MEASURES.items():
                    values = [interval.value for interval in what.measures[key]]
                    style = {"linewidth": 3, "zorder": 3} if key == "psi" else {"linewidth": 1.6, "alpha": 0.9}
                    axes.plot(
                        what.points, values, "o-", markersize=4, color=colors[key], label=in_figure(label), **style
                    )
                band_low = [interval.low for interval in what.measures["psi"]]
                band_high = [interval.high for interval in what.measures["psi"]]
                axes.fill_between(what.points, band_low, band_high, color=colors["psi"], alpha=0.15, linewidth=0)
                axes.axhline(0, color=INK, linewidth=0.8)
                axes.set_ylim(-1.05, 1.05)
                if what is epoch:
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel(f"at equal {name}")
                if what is loss and what.points:
                    axes.invert_xaxis()
            grid[0, column].set_title(table.sweep.title)
        for axes in grid[:, 0]:
            axes.set_ylabel("rank correlation")
        fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
        save(fig, path)


def plot_summary(found: Sequence[tuple[Table, Correlations, Correlations]], path: Path) -> None:
    """Every measure's correlation with its interval: at the last epoch, and at the lowest common training loss."""
    with styled():
        fig = figure(3.6 * len(found) + 2.6, 5.6)
        fig.suptitle("Spearman rank correlation with the gap\nwith 95 % bootstrap intervals")
        panels = fig.subplots(1, len(found), sharey=True, squeeze=False)[0]
        rows = np.arange(len(MEASURES))[::-1]
        for axes, (table, epoch, loss) in zip(panels, found, strict=True):
            lowest = f"training loss {loss.points[-1]:.2g}" if loss.points else "equal training loss: none"
            for shift, what, marker, color, label in (
                (0.16, epoch, "o", "C0", f"epoch {table.epochs[-1]}"),
                (-0.16, loss, "s", "C1", lowest),
            ):
                intervals = [what.measures[key][-1] for key in MEASURES] if what.points else []
                for row, interval in zip(rows, intervals, strict=False):
                    estimate(axes, row + shift, interval, color, marker, across=True, markersize=7)
                axes.plot([], [], marker + "-", color=color, label=label)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_xlim(-1.08, 1.08)
            axes.set_yticks(rows, map(in_figure, MEASURES.values()))
            axes.set_title(table.sweep.title, fontsize=12)
            axes.set_xlabel("rank correlation")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
        save(fig, path)


def report(found: Sequence[tuple[Table, Correlations, Correlations]]) -> str:
    """Markdown tables: every measure's correlation, and how far PACGen's is ahead of it."""
    lines = []
    for table, epoch, loss in found:
        lines += ["", f"### {table.sweep.title}", ""]
        lowest = f"training loss {loss.points[-1]:.3g}" if loss.points else "equal training loss"
        lines.append(f"| measure | at epoch {table.epochs[-1]} | PACGen ahead by | at {lowest} | PACGen ahead by |")
        lines.append("| --- | --- | --- | --- | --- |")
        for key, label in MEASURES.items():
            cells = []
            for what in (epoch, loss):
                cells.append(f"{what.measures[key][-1]:+.2f}" if what.points else "-")
                cells.append(f"{what.ahead[key][-1]:+.2f}" if what.points and key in what.ahead else "-")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        counts = f"{epoch.runs[-1]} runs" + (f" and {loss.runs[-1]} runs" if loss.points else "")
        capped = {key: np.nanmean(table.columns[key][..., -1]) for key in ("capped", "capped_sqrt_m")}
        lines += [
            "",
            f"{len(table.values)} settings x {len(table.seeds)} seeds ({counts}). Of the weights, "
            f"{100 * capped['capped']:.1f} % have their noise limited by the neighbourhood rather than by curvature "
            f"({100 * capped['capped_sqrt_m']:.1f} % with rho sqrt(m)), at the last epoch.",
        ]
    return "\n".join(lines).strip() + "\n"
