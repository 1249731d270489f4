"""Does PACGen rank networks as their generalisation gap does? Sweeps over batch size and learning rate.

The network of the PyTorch MNIST example, without dropout, is trained by SGD with momentum 0.5 on MNIST and CIFAR-10:
over the batch size at learning rate 0.1, and over the learning rate at batch size 256, with several seeds. At every
epoch: training and test loss, PACGen at gamma = eps = 0.1, and simpler measures beside it (Wang et al. 2018,
arXiv 1809.07402, section 4). Then Spearman's rank correlation of each measure with the gap, test loss less training
loss, across settings at equal epoch and at equal training loss.

    python examples/pacgen/sweeps.py --mnist FOLDER --cifar10 ARCHIVE --out out/sweeps
    python examples/pacgen/sweeps.py --out out/sweeps --plot-only

An interrupted command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from _measures import MEASURES, measure
from _network import Net, evaluate, train_epoch

from _common.errors import UsageError
from _common.figures import INK, MaxNLocator, band, estimate, figure, frame_lines, in_figure, save, shades, styled
from _common.files import write_summary
from _common.flags import cifar10_flag, common_flags, main, mnist_flag, size_flags, size_of, training_flags
from _common.images import TITLES, Batches, Images, Source
from _common.intervals import Array, Interval, Resamples, at_level, common_levels
from _common.runs import Log, Run, perform, results_in, seed_of

RATE, BATCH, MOMENTUM = 0.1, 256, 0.5  # what the sweep over the other one holds fixed
LEVELS = 6  # training losses at which settings are compared


class Size(NamedTuple):
    """How much is trained and measured; 0 images are all that there are."""

    batches: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    epochs: int
    every: int  # epochs between two measurements
    train: int
    test: int
    measured: int  # training images on which the measures are taken, the same ones always
    probes: int
    iterations: int
    draws: int  # of isotropic noise


HOUR = Size(
    batches=(32, 64, 128, 256, 512),
    rates=(0.025, 0.05, 0.1, 0.15, 0.2),
    seeds=3,
    epochs=25,
    every=1,
    train=3000,
    test=2000,
    measured=100,
    probes=4,
    iterations=6,
    draws=6,
)
# The paper does not state its grids nor how long it trained. All images of both data sets, 15 times as many probes.
FULL = Size(
    batches=(64, 128, 256, 512, 1024, 2048, 4096),
    rates=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    seeds=5,
    epochs=100,
    every=1,
    train=0,
    test=0,
    measured=2000,
    probes=60,
    iterations=30,
    draws=40,
)


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


# ---- one run ----


#: What is measured of a model, given the settings of its run and the training images.
Measure = Callable[[Net, dict[str, Any], Images], dict[str, Any]]


def flatness(model: Net, s: dict[str, Any], train: Images) -> dict[str, float]:
    """The measures that are compared with the gap."""
    return measure(model, s["task"], train.part(0, s["measured"]), s)


def trained(source: Source, measured: Measure, run: Run, log: Log) -> dict[str, Any]:
    """One run: the losses and what ``measured`` says, at every epoch that its settings name."""
    s = run.settings
    train, test = source.images(s["task"])
    train, test = train.part(0, s["train"]), test.part(0, s["test"])
    torch.manual_seed(seed_of("weights", s["seed"]))
    model = Net(s["task"]).to(source.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=s["lr"], momentum=s["momentum"])
    state = log.restore(model, optimizer)
    epochs: list[dict[str, Any]] = state.get("epochs", [])
    for epoch in range(state["epoch"] + 1, s["epochs"] + 1):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed_of("order", s["seed"], epoch))
        order = torch.randperm(s["train"], generator=generator)
        running = train_epoch(model, Batches(s["task"], train, s["batch"], order), optimizer)
        if epoch % s["every"] == 0:
            row = {"epoch": epoch, "running_loss": running, **losses(model, s["task"], train, test)}
            epochs.append(row | measured(model, s, train) | {"seconds": time.perf_counter() - start})
        log.keep(epoch, model, optimizer, epochs=epochs)
    return {"epochs": epochs}


def losses(model: Net, task: str, train: Images, test: Images) -> dict[str, float]:
    """Loss in nats and accuracy in percent of both parts, and the gap: test loss less training loss."""
    train_loss, train_accuracy = evaluate(model, Batches(task, train, 1000))
    test_loss, test_accuracy = evaluate(model, Batches(task, test, 1000))
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "gap": test_loss - train_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
    }


def plan(args: argparse.Namespace, counts: dict[str, tuple[int, int]]) -> list[Run]:
    """All runs of the chosen sweeps, each once. ``counts`` are the images that each task has."""
    size = args.size
    runs = {}
    for sweep in (SWEEPS[name] for name in args.sweeps):
        values = size.batches if sweep.varied == "batch" else size.rates
        for value in values:
            batch, rate = (value, RATE) if sweep.varied == "batch" else (BATCH, value)
            for seed in range(args.seed, args.seed + size.seeds):
                settings = {
                    "task": sweep.task,
                    "batch": batch,
                    "lr": rate,
                    "momentum": MOMENTUM,
                    "seed": seed,
                    "epochs": size.epochs,
                    "every": size.every,
                    "train": size.train or counts[sweep.task][0],
                    "test": size.test or counts[sweep.task][1],
                    "measured": size.measured,
                    "gamma": 0.1,
                    "eps": 0.1,
                    "lipschitz": "max",
                    "probes": size.probes,
                    "power_iterations": size.iterations,
                    "noise": 0.02,
                    "noise_samples": size.draws,
                    "measure_seed": 0,
                    "device": args.device,
                }
                name = f"{sweep.task}-batch{batch}-lr{rate:g}-seed{seed}"
                runs[name] = Run(name, settings)
    return list(runs.values())


# ---- what the runs say ----


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
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center")
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
        handles, labels = grid[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center")
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


def evaluate_all(args: argparse.Namespace) -> None:
    """Read every finished run in ``--out``, and write figures, ``summary.json`` and ``summary.md``."""
    results = results_in(args.out)
    tables = [table for name in args.sweeps if (table := tabulate(SWEEPS[name], results)) is not None]
    if not tables:
        raise UsageError(f"--out {args.out}: no finished runs with two settings to compare; run without --plot-only")
    found = [(table, at_equal_epoch(table), at_equal_loss(table)) for table in tables]
    summary = {
        table.sweep.name: {
            "settings": table.values,
            "seeds": table.seeds,
            "equal_epoch": epoch.as_dict(),
            "equal_training_loss": loss.as_dict(),
        }
        for table, epoch, loss in found
    }
    write_summary(args.out, summary, report(found))
    for table, _, _ in found:
        plot_sweep(table, args.out / f"{table.sweep.name}.png")
    plot_by_point(found, args.out / "correlation_by_epoch.png")
    plot_summary(found, args.out / "correlation.png")


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_flags(parser, "out/sweeps")
    training_flags(parser, "the size of the paper, all images, 100 epochs, 5 seeds, instead of an hour on two cores")
    mnist_flag(parser)
    cifar10_flag(parser, "--cifar10")
    names = list(SWEEPS)
    parser.add_argument("--sweeps", nargs="+", choices=names, default=names, help="which of the four (all)")
    size_flags(
        parser,
        {
            "batches": "batch sizes of the sweep",
            "rates": "learning rates of the sweep",
            "seeds": "seeds of each setting",
            "epochs": "passes over the training images",
            "every": "epochs between two measurements",
            "train": "training images",
            "test": "test images",
            "measured": "training images on which the measures are taken",
            "probes": "probes of the Hessian's diagonal",
            "iterations": "power iterations for the largest eigenvalue",
            "draws": "draws of isotropic noise for the expected sharpness",
        },
        HOUR,
    )
    args = parser.parse_args(argv)
    args.size = size_of(args, HOUR, FULL)
    if args.size.epochs < args.size.every:
        parser.error(f"argument --every: {args.size.every} given, but there are {args.size.epochs} epochs")
    return args


def run(args: argparse.Namespace) -> None:
    """Train what is missing, then evaluate everything."""
    if not args.plot_only:
        source = Source.of(args, sorted({SWEEPS[name].task for name in args.sweeps}))
        counts = {}
        for task in source.paths:  # here and not in the processes: errors come early, images are decoded once
            train, test = source.images(task)
            counts[task] = len(train.labels), len(test.labels)
        runs = plan(args, counts)
        smallest = {task: min(r.settings["train"] for r in runs if r.settings["task"] == task) for task in counts}
        for task, used in smallest.items():
            if args.size.measured > used or used > counts[task][0]:
                raise UsageError(f"{TITLES[task]}: {args.size.measured} measured and {used} training images asked for "
                                 f"of {counts[task][0]}")  # fmt: skip
        start = time.perf_counter()
        perform(args.out, runs, partial(trained, source, flatness), args.jobs, "sweeps")
        print(f"{len(runs)} runs, {math.ceil((time.perf_counter() - start) / 60)} min")
    evaluate_all(args)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
