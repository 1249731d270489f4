"""Which measure ranks nets as their generalisation gap does? One report over the nets of the PACGen sweeps.

The networks of examples/pacgen/sweeps.py, over batch sizes and over learning rates, trained again, and measured at the
end by :func:`flatmin.report`: eigenvalues, trace, m-sharpness, expected sharpness, PACGen, norms. Then Spearman's rank
correlation of each measure with the gap, test loss less training loss, across settings and seeds.

    python examples/sharpness/ranking.py --mnist FOLDER --cifar10 ARCHIVE --out out/ranking
    python examples/sharpness/ranking.py --out out/ranking --plot-only

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
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pacgen"))

import numpy as np
import torch.nn.functional as F
from _sweep_tables import BATCH, RATE, SWEEPS, Sweep, Table, tabulate
from sweeps import MOMENTUM, sweep_flags, trained
from torch import nn

import flatmin
from _common.errors import UsageError
from _common.figures import INK, estimate, figure, save, styled
from _common.files import write_summary
from _common.flags import main, size_flags, size_of
from _common.images import TITLES, Batches, Images, Source
from _common.intervals import Array, Interval, Resamples
from _common.runs import Run, perform, results_in

#: Rows of the report that rank: key and name. Every one is larger at a sharper minimum, or a more complex net.
MEASURES = {
    "m_sharpness_1": "m-sharpness, m = 1",
    "m_sharpness_16": "m-sharpness, m = 16",
    "m_sharpness_all": "m-sharpness, all samples",
    "lambda_1": "lambda_1",
    "lambda_1_over_lambda_5": "lambda_1 / lambda_5",
    "trace": "trace",
    "expected_sharpness": "expected sharpness",
    "expected_relative_sharpness": "expected sharpness, relative noise",
    "psi": "PACGen",
    "bound_uniform": "bound of PACGen",
    "weight_norm": "weight norm",
    "gradient_norm": "gradient norm",
    "train_loss": "training loss",
}
#: Samples in the groups of m-sharpness; None is all.
M = (1, 16, None)


class Size(NamedTuple):
    """How much is trained and measured."""

    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.15, 0.2)
    seeds: int = 3
    epochs: int = 15
    train: int = 1500
    test: int = 2000
    samples: int = 100
    products: int = 40
    probes: int = 2
    steps: int = 15
    pairs: int = 4
    curvature_samples: int = 4
    noise_samples: int = 3
    groups: int = 64


FULL = Size(epochs=25, train=3000, samples=200, products=60, steps=20, pairs=5, curvature_samples=5)


AMOUNTS = ("samples", "products", "probes", "steps", "pairs", "curvature_samples", "noise_samples", "groups")


def reported(model: nn.Module, s: dict[str, Any], train: Images) -> dict[str, Any]:
    """The rows of the report, without the losses, which the sweeps have of all images; and how long it took."""
    data = list(Batches(s["task"], train.part(0, s["amounts"]["samples"]), 500))
    found = flatmin.report(model, F.nll_loss, data, m=M, amounts=s["amounts"], seed=s["measure_seed"], progress=False)
    rows = {row.key: row.value for row in found if row.key in MEASURES and row.key != "train_loss"}
    return rows | {"report_seconds": found.settings["seconds"]}


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs of the chosen sweeps, each once, those of a seed after each other."""
    size: Size = args.size
    runs = {}
    for seed in range(args.seed, args.seed + size.seeds):
        for sweep in (SWEEPS[name] for name in args.sweeps):
            for value in size.batches if sweep.varied == "batch" else size.rates:
                batch, rate = (value, RATE) if sweep.varied == "batch" else (BATCH, value)
                settings = {
                    "task": sweep.task,
                    "batch": batch,
                    "lr": rate,
                    "momentum": MOMENTUM,
                    "seed": seed,
                    "epochs": size.epochs,
                    "every": size.epochs,
                    "train": size.train,
                    "test": size.test,
                    "amounts": {name: getattr(size, name) for name in AMOUNTS},
                    "measure_seed": 0,
                    "device": args.device,
                }
                name = f"{sweep.task}-batch{batch}-lr{rate:g}-seed{seed}"
                runs[name] = Run(name, settings)
    return list(runs.values())


# ---- what the runs say ----


class Ranked(NamedTuple):
    """One sweep: every measure with its correlation, and by how much PACGen's is above it."""

    table: Table
    runs: int
    correlation: dict[str, Interval]
    pacgen_above: dict[str, Interval]


def rank(table: Table) -> Ranked:
    gap = table.columns["gap"][..., -1]
    measures: dict[str, Array] = {key: table.columns[key][..., -1] for key in MEASURES}
    valid = np.isfinite(gap) & np.all([np.isfinite(values) for values in measures.values()], axis=0)
    resamples = Resamples(valid)
    psi = measures["psi"]
    return Ranked(
        table,
        resamples.runs,
        {key: resamples.correlation(values, gap) for key, values in measures.items()},
        {key: resamples.difference(psi, values, gap) for key, values in measures.items() if key != "psi"},
    )


def report(ranked: Sequence[Ranked]) -> str:
    """A markdown table: a row for each measure, a column for each sweep."""
    varied = {"batch": "batch size", "lr": "learning rate"}
    head = [f"{TITLES[r.table.sweep.task]}, {varied[r.table.sweep.varied]}" for r in ranked]
    lines = [f"| measure | {' | '.join(head)} |", "| --- " * (len(ranked) + 1) + "|"]
    for key, name in MEASURES.items():
        lines.append(f"| {name} | {' | '.join(f'{r.correlation[key]:+.2f}' for r in ranked)} |")
    gaps = [r.table.columns["gap"][..., -1] for r in ranked]
    lines.append(
        f"| gap (nats), least to most | {' | '.join(f'{np.nanmin(g):.2f} to {np.nanmax(g):.2f}' for g in gaps)} |"
    )
    lines.append(f"| runs | {' | '.join(str(r.runs) for r in ranked)} |")
    seconds = np.concatenate([r.table.columns["report_seconds"].ravel() for r in ranked])
    lines += [
        "",
        f"Spearman's rank correlation with the gap at epoch {ranked[0].table.epochs[-1]}, across settings and seeds, "
        f"95 % bootstrap intervals over both. A report took {np.nanmean(seconds):.0f} s.",
    ]
    return "\n".join(lines) + "\n"


def plot(ranked: Sequence[Ranked], path: Path) -> None:
    """Every measure's correlation with its interval, a panel for each sweep."""
    with styled():
        fig = figure(3.8 * len(ranked) + 3, 6.6)
        fig.suptitle("Spearman rank correlation with the gap\nbar: 95 % bootstrap interval")
        rows = np.arange(len(MEASURES))[::-1]
        names = MEASURES.values()
        labels = [name.replace("lambda_1", r"$\lambda_1$").replace("lambda_5", r"$\lambda_5$") for name in names]
        for axes, r in zip(fig.subplots(1, len(ranked), sharey=True, squeeze=False)[0], ranked, strict=True):
            for row, (key, interval) in zip(rows, r.correlation.items(), strict=True):
                color = "C3" if key == "psi" else "C0"
                estimate(axes, row, interval, color, across=True, markersize=7)
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.set_xlim(-1.08, 1.08)
            axes.set_yticks(rows, labels)
            axes.set_title(r.table.sweep.title.replace(", SGD, ", "\nSGD, "), fontsize=12)
            axes.set_xlabel("rank correlation")
        save(fig, path)


def evaluate_all(args: argparse.Namespace) -> None:
    """Read every finished run in ``--out``, and write the figure, ``summary.json`` and ``summary.md``."""
    results = results_in(args.out)
    sweeps: list[Sweep] = [SWEEPS[name] for name in args.sweeps]
    ranked = [rank(table) for sweep in sweeps if (table := tabulate(sweep, results)) is not None]
    if not ranked:
        raise UsageError(f"--out {args.out}: no finished runs with two settings to compare; run without --plot-only")
    summary = {
        r.table.sweep.name: {
            "settings": r.table.values,
            "seeds": r.table.seeds,
            "runs": r.runs,
            "correlation": {key: i._asdict() for key, i in r.correlation.items()},
            "pacgen_less_measure": {key: i._asdict() for key, i in r.pacgen_above.items()},
        }
        for r in ranked
    }
    write_summary(args.out, summary, report(ranked))
    plot(ranked, args.out / "ranking.png")


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sweep_flags(parser, "out/ranking", "more epochs, more images and more to measure with")
    size_flags(
        parser,
        {
            "batches": "batch sizes of the sweep",
            "rates": "learning rates of the sweep",
            "seeds": "seeds of each setting",
            "epochs": "passes over the training images",
            "train": "training images",
            "test": "test images",
            "samples": "training images on which a report measures",
            "products": "of a report, for eigenvalues",
            "probes": "of a report, for the density",
            "steps": "of Lanczos for each probe",
            "pairs": "of draws of a report, for the expected sharpness",
            "curvature_samples": "probes of a report, for PACGen",
            "noise_samples": "draws of a report, for PACGen",
            "groups": "of a report, for m-sharpness",
        },
        Size(),
    )
    args = parser.parse_args(argv)
    args.size = size_of(args, Size(), FULL)
    largest = max(m for m in M if m is not None)
    if args.size.samples < largest:
        parser.error(
            f"argument --samples: {args.size.samples} given; m-sharpness takes groups of {largest}, so at least that"
        )
    return args


def run(args: argparse.Namespace) -> None:
    """Train what is missing, then evaluate everything."""
    if not args.plot_only:
        if args.size.samples > args.size.train:
            raise UsageError(f"--samples {args.size.samples}: more than the {args.size.train} training images")
        source = Source.of(args, sorted({SWEEPS[name].task for name in args.sweeps}))
        for task in source.paths:  # here and not in the processes: errors come early, images are decoded once
            train, test = source.images(task)
            train.part(0, args.size.train), test.part(0, args.size.test)
        perform(args.out, plan(args), partial(trained, source, reported), args.jobs, "ranking")
    evaluate_all(args)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
