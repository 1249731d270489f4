"""Does SAM find minima of smaller curvature? The spectrum of the Hessian, at the start, in the middle and at the end.

A net without BatchNorm is trained on CIFAR-10 by SGD with momentum and by the same SGD in SAM, from the same weights in
the same order, with several seeds. Each time: the five largest eigenvalues, lambda_1 / lambda_5, and the density of all
(Foret et al. 2020, arXiv 2010.01412, figure 3). With intervals over the seeds.

    python examples/sharpness/spectra.py --data ARCHIVE --out out/spectra
    python examples/sharpness/spectra.py --out out/spectra --plot-only

An interrupted command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from _nets import check_images, cifar10, train
from torch import nn

from _common.errors import UsageError
from _common.figures import INK, estimate, figure, save, styled
from _common.files import write_summary
from _common.flags import cifar10_flag, common_flags, main, size_flags, size_of, training_flags
from _common.images import Source
from _common.intervals import Array, Interval, mean_interval, mean_of
from _common.runs import Log, Run, perform, results_in
from flatmin import curvature

METHODS = ("SGD", "SAM")
COLORS, WIDTHS = {"SGD": "C0", "SAM": "C1"}, {"SGD": 3.2, "SAM": 1.6}  # both can be seen where they are one
TIMES = ("start", "middle", "end")
CLEARLY = 0.01  # of lambda_1: nearer to 0 the nodes of few steps lie on both sides
#: What is compared: key of the JSON, name, and whether it is positive and compared as a ratio.
MEASURES = {
    "lambda_1": ("lambda_1 (loss / weight^2)", True),
    "lambda_1_over_lambda_5": ("lambda_1 / lambda_5", True),
    "trace": ("trace (loss / weight^2)", True),
    "train_loss": ("training loss (nats)", True),
    "gap": ("gap: test - training loss (nats)", False),
    "test_accuracy": ("test accuracy (%)", False),
}


class Size(NamedTuple):
    """How much is trained and measured."""

    seeds: int = 5
    epochs: int = 30
    train: int = 2000
    test: int = 2000
    measured: int = 250
    batch: int = 100
    lr: float = 0.05
    momentum: float = 0.9
    rho: float = 0.1
    probes: int = 2
    steps: int = 25


FULL = Size(epochs=60, train=5000, measured=1000, probes=4, steps=40)


def trained(source: Source, run: Run, log: Log) -> dict[str, Any]:
    """One run, measured at the epochs that its settings name."""
    s = run.settings
    data = cifar10(source, s["train"], s["test"])
    return train(run, log, data, lambda model: spectrum(model, data.measured(s["measured"]), s))


def spectrum(model: nn.Module, data: Any, s: dict[str, Any]) -> dict[str, Any]:
    """Eigenvalues and density of the Hessian of the mean loss, with the same probes every time."""
    with curvature.linear_operator(model, F.cross_entropy, data, progress=False) as A:
        top = curvature.eigenvalues(A, k=5, seed=s["measure_seed"])
        density = curvature.spectral_density(A, probes=s["probes"], steps=s["steps"], seed=s["measure_seed"])
    trace = density.trace_of(lambda x: x)
    return {
        "eigenvalues": list(top.values),
        "residuals": list(top.residuals),
        "lambda_1": top.lambda_1,
        "lambda_1_over_lambda_5": top.lambda_1_over_lambda_5,
        "trace": trace.value,
        "trace_stderr": trace.stderr,
        "nodes": [x.tolist() for x in density.nodes],
        "weights": [x.tolist() for x in density.weights],
        "dimension": density.dimension,
        "products": top.products + density.products,
    }


def plan(size: Size, first: int) -> list[Run]:
    """All runs, those of a seed after each other: what is finished early can be compared."""
    runs = []
    for seed in range(first, first + size.seeds):
        for method in METHODS:
            settings = {
                **{k: v for k, v in size._asdict().items() if k not in ("seeds", "rho")},
                "method": method,
                "rho": size.rho if method == "SAM" else 0.0,
                "m": size.batch,
                "measured_at": [0, size.epochs // 2, size.epochs],
                "seed": seed,
                "measure_seed": 0,
            }
            runs.append(Run(f"{method}-seed{seed}", settings))
    return runs


# ---- what the runs say ----


class Found(NamedTuple):
    """Runs of the seeds that both methods have finished: rows[method][seed][time]."""

    seeds: list[int]
    rows: dict[str, list[list[dict[str, Any]]]]
    settings: dict[str, Any]

    def values(self, method: str, key: str, time: int) -> Array:
        return np.array([row[time][key] for row in self.rows[method]], float)

    def interval(self, method: str, key: str, time: int) -> Interval:
        return mean_of(self.values(method, key, time))

    def paired(self, key: str, time: int, ratio: bool) -> Interval:
        """SAM against SGD, seed by seed: geometric mean of the ratios, or mean of the differences."""
        sgd, sam = (self.values(method, key, time) for method in METHODS)
        if not ratio:
            return mean_of(sam - sgd)
        if min(sgd.min(), sam.min()) <= 0.0:  # a trace at the start may be negative
            return Interval(np.nan, np.nan, np.nan)
        return Interval(*(float(np.exp(x)) for x in mean_interval(np.log(sam / sgd))))

    def density(self, method: str, time: int) -> curvature.SpectralDensity:
        """Of all seeds: their probes together are those of the mean density."""
        rows = [row[time] for row in self.rows[method]]
        nodes, weights = ([torch.tensor(x).double() for row in rows for x in row[key]] for key in ("nodes", "weights"))
        return curvature.SpectralDensity(
            tuple(nodes), tuple(weights), rows[0]["dimension"], sum(row["products"] for row in rows)
        )


def collect(out: Path) -> Found:
    results = results_in(out)
    by = {(r["settings"]["method"], r["settings"]["seed"]): r for r in results}
    seeds = sorted(seed for method, seed in by if method == "SGD" and ("SAM", seed) in by)
    if not seeds:
        raise UsageError(f"--out {out}: no seed has finished runs of both methods; run without --plot-only")
    rows = {method: [by[method, seed]["epochs"] for seed in seeds] for method in METHODS}
    return Found(seeds, rows, by["SAM", seeds[0]]["settings"])


def report(found: Found) -> str:
    """Markdown: every measure at every time, and SAM against SGD."""
    lines = ["| | epoch | SGD | SAM | SAM / SGD or SAM - SGD |", "| --- | --- | --- | --- | --- |"]
    for key, (label, ratio) in MEASURES.items():
        for time, name in enumerate(TIMES):
            epoch = found.settings["measured_at"][time]
            cells = [f"{found.interval(method, key, time):.3g}" for method in METHODS]
            against = f"{found.paired(key, time, ratio):{'.3f' if ratio else '+.3f'}}"
            lines.append(f"| {label} | {epoch}, {name} | {cells[0]} | {cells[1]} | {'x ' * ratio}{against} |")
    shares = []
    for method in METHODS:
        below = found.density(method, 2).mass_below(-CLEARLY * found.interval(method, "lambda_1", 2).value)
        shares.append(f"{100.0 * below.value:.2g} % of {method}'s")
    lines += [
        "",
        f"{len(found.seeds)} seeds, 95 % t intervals; SAM against SGD is paired by seed. At the end {shares[0]} "
        f"eigenvalues are below -{CLEARLY:g} lambda_1, and {shares[1]}.",
    ]
    return "\n".join(lines) + "\n"


# ---- figures ----


def plot_density(found: Found, path: Path) -> None:
    """Mean density of all seeds at the three times, on a logarithmic axis."""
    with styled():
        fig = figure(17, 5)
        fig.suptitle(f"Eigenvalues of the Hessian: {len(found.seeds)} seeds, band: 95 % interval", fontsize=14)
        for time, (axes, name) in enumerate(zip(fig.subplots(1, 3), TIMES, strict=True)):
            densities = {method: found.density(method, time) for method in METHODS}
            low, high = (f(d.range[i] for d in densities.values()) for i, f in enumerate((min, max)))
            for method, density in densities.items():
                grid, value, stderr = (x.numpy() for x in density.on_grid(1000, sigma=0.01 * (high - low)))
                axes.plot(grid, value, color=COLORS[method], label=method, linewidth=WIDTHS[method])
                axes.fill_between(
                    grid, np.maximum(value - 1.96 * stderr, 1e-12), value + 1.96 * stderr, color=COLORS[method],
                    alpha=0.2, linewidth=0,
                )  # fmt: skip
                axes.axvline(density.range[1], color=COLORS[method], linestyle=":", linewidth=1.2)
            axes.set_yscale("log")
            top = max(line.get_ydata().max() for line in axes.get_lines()[::2])
            axes.set_ylim(0.1 / densities["SGD"].dimension * top, 2 * top)
            axes.set_xlabel("eigenvalue (loss / weight$^2$)")
            axes.set_title(f"{name}: epoch {found.settings['measured_at'][time]}")
            axes.legend()
        fig.axes[0].set_ylabel("density (weight$^2$ / loss)")
        save(fig, path)


def plot_eigenvalues(found: Found, path: Path) -> None:
    """Every seed as a point, means with intervals, at the three times."""
    panels = {
        "lambda_1": r"$\lambda_1$ (loss / weight$^2$)",
        "lambda_1_over_lambda_5": r"$\lambda_1 / \lambda_5$",
        "trace": "trace (loss / weight$^2$)",
        "test_accuracy": "test accuracy (%)",
    }
    with styled():
        fig = figure(17, 4.8)
        fig.suptitle(f"SAM against SGD: {len(found.seeds)} seeds, bar: 95 % interval of the mean", fontsize=14)
        for axes, (key, label) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
            for shift, method in ((-0.12, "SGD"), (0.12, "SAM")):
                for time in range(len(TIMES)):
                    interval, values = found.interval(method, key, time), found.values(method, key, time)
                    x = time + shift
                    axes.plot([x + 0.06] * len(values), values, ".", color=COLORS[method], alpha=0.5)
                    named = {"label": method} if time == 0 else {}
                    estimate(axes, x, interval, COLORS[method], markersize=7, **named)
            axes.set_xticks(range(len(TIMES)), [f"{n}\n(epoch {e})" for n, e in
                                                zip(TIMES, found.settings["measured_at"], strict=True)])  # fmt: skip
            axes.set_ylabel(label)
            axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5) if key == "trace" else None
        fig.axes[0].legend()
        save(fig, path)


def evaluate_all(out: Path) -> None:
    """Read every finished run in ``out``, and write figures, ``summary.json`` and ``summary.md``."""
    found = collect(out)
    summary = {
        key: {
            name: {
                **{method: found.interval(method, key, time)._asdict() for method in METHODS},
                "SAM / SGD" if ratio else "SAM - SGD": found.paired(key, time, ratio)._asdict(),
            }
            for time, name in enumerate(TIMES)
        }
        for key, (_, ratio) in MEASURES.items()
    }
    write_summary(out, {"seeds": found.seeds, "settings": found.settings, **summary}, report(found))
    plot_density(found, out / "density.png")
    plot_eigenvalues(found, out / "eigenvalues.png")


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    common_flags(parser, "out/spectra")
    training_flags(parser, "more epochs, more images and more to measure with")
    cifar10_flag(parser, "--data")
    size_flags(
        parser,
        {
            "seeds": "seeds of each method",
            "epochs": "passes over the training images",
            "train": "training images",
            "test": "test images",
            "measured": "training images on which curvature is measured",
            "batch": "batch size",
            "lr": "learning rate at the start",
            "momentum": "of SGD",
            "rho": "radius of SAM",
            "probes": "of the density",
            "steps": "of Lanczos for each probe",
        },
        Size(),
    )
    args = parser.parse_args(argv)
    args.size = size_of(args, Size(), FULL)
    if args.size.epochs < 2:
        parser.error(f"argument --epochs: {args.size.epochs} given; start, middle and end need at least 2")
    if not args.size.rho > 0.0:
        parser.error(f"argument --rho: {args.size.rho} given; SAM needs a radius > 0")
    return args


def run(args: argparse.Namespace) -> None:
    """Train what is missing, then evaluate everything."""
    if not args.plot_only:
        source = Source.of(args, ["cifar10"])
        check_images(args.size)
        cifar10(source, args.size.train, args.size.test)  # errors come early, decoded once
        perform(args.out, plan(args.size, args.seed), partial(trained, source), args.jobs, "spectra")
    evaluate_all(args.out)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
