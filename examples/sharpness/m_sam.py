"""Which m for m-SAM, and which m-sharpness follows the gap? Nets trained with perturbations for m samples at a time.

A net without BatchNorm is trained on CIFAR-10 by SGD with momentum, and by the same SGD in SAM where each m samples of
a batch have a perturbation of their own (m-SAM), for several m and radii, with several seeds. At the end: test error,
the gap, test loss less training loss, and m-sharpness for several m at one radius. Then Spearman's rank correlation of
each m-sharpness with the gap across settings and seeds, with bootstrap intervals (Foret et al. 2020, arXiv 2010.01412,
section 4.2: small m follows the gap best).

    python examples/sharpness/m_sam.py --data ARCHIVE --out out/m_sam
    python examples/sharpness/m_sam.py --out out/m_sam --plot-only

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
import torch.nn.functional as F
from _nets import check_images, cifar10, train
from torch import nn

from _common.errors import UsageError
from _common.figures import INK, estimate, figure, save, shades, styled
from _common.files import write_summary
from _common.flags import cifar10_flag, common_flags, main, size_flags, size_of, training_flags
from _common.images import Source
from _common.intervals import Array, Interval, Resamples, mean_of
from _common.runs import Log, Run, perform, results_in
from flatmin import sharpness

#: With what the sharpness is compared: key of the JSON and name.
TARGETS = {"gap": "gap: test - training loss", "test_error": "test error"}


class Size(NamedTuple):
    """How much is trained and measured."""

    seeds: int = 3
    epochs: int = 20
    train: int = 2000
    test: int = 2000
    measured: int = 500
    batch: int = 100
    lr: float = 0.05
    momentum: float = 0.9
    m: tuple[int, ...] = (4, 20, 100)
    rho: tuple[float, ...] = (0.05, 0.1)
    sizes: tuple[int, ...] = (1, 4, 20, 100, 500)
    radius: float = 0.05
    groups: int = 100


FULL = Size(seeds=5, epochs=40, measured=1000, m=(1, 4, 20, 100), sizes=(1, 4, 20, 100, 1000), groups=200)


def trained(source: Source, run: Run, log: Log) -> dict[str, Any]:
    """One run, measured at the epochs that its settings name."""
    s = run.settings
    data = cifar10(source, s["train"], s["test"])
    return train(run, log, data, lambda model: sharp(model, data.measured(s["measured"]), s))


def sharp(model: nn.Module, data: Any, s: dict[str, Any]) -> dict[str, float]:
    """m-sharpness for each size of groups, at one radius for all nets."""
    found = {}
    for m in s["sizes"]:
        value = sharpness.m_sharpness(
            model, F.cross_entropy, data, s["radius"], m, max_groups=s["groups"], progress=False
        )
        found |= {f"sharpness_{m}": value.value, f"sharpness_{m}_stderr": value.stderr}
    return found


def label(rho: float, m: int | None) -> str:
    return f"m = {m}, rho = {rho:g}" if rho else "SGD"


def plan(size: Size, first: int) -> list[Run]:
    """All runs, those of a seed after each other: what is finished early can be compared."""
    runs = []
    for seed in range(first, first + size.seeds):
        for rho, m in [(0.0, None), *((rho, m) for rho in size.rho for m in size.m)]:
            settings = {
                **{k: v for k, v in size._asdict().items() if k not in ("seeds", "rho", "m", "sizes")},
                "rho": rho,
                "m": m,
                "sizes": list(size.sizes),
                "measured_at": [size.epochs],
                "seed": seed,
            }
            name = f"m{m}-rho{rho:g}-seed{seed}" if rho else f"sgd-seed{seed}"
            runs.append(Run(name, settings))
    return runs


# ---- what the runs say ----


class Found(NamedTuple):
    """The last rows of the runs, of the seeds that are complete."""

    settings: list[tuple[float, int | None]]  # radius and m; (0, None) is SGD
    seeds: list[int]
    sizes: list[int]  # of the groups
    columns: dict[str, Array]  # [settings, seeds]
    common: dict[str, Any]

    def interval(self, key: str, setting: tuple[float, int | None]) -> Interval:
        return mean_of(self.columns[key][self.settings.index(setting)])

    def against_sgd(self, key: str, setting: tuple[float, int | None]) -> Interval:
        """The mean difference to SGD, paired by seed."""
        sgd, here = (self.columns[key][self.settings.index(s)] for s in ((0.0, None), setting))
        return mean_of(here - sgd)


def collect(out: Path) -> Found:
    results = results_in(out)
    rows = {(r["settings"]["rho"], r["settings"]["m"], r["settings"]["seed"]): r["epochs"][-1] for r in results}
    settings = sorted({key[:2] for key in rows}, key=lambda s: (s[0], s[1] or 0))
    seeds = [seed for seed in sorted({key[2] for key in rows}) if all((rho, m, seed) in rows for rho, m in settings)]
    if not seeds or (0.0, None) not in settings:
        raise UsageError(f"--out {out}: no seed has finished every setting; run without --plot-only")
    sizes = results[0]["settings"]["sizes"]
    keys = ["gap", "train_loss", "test_loss", "test_accuracy", *(f"sharpness_{m}" for m in sizes)]
    columns = {
        key: np.array([[rows[rho, m, seed][key] for seed in seeds] for rho, m in settings], float) for key in keys
    }
    columns["test_error"] = 100.0 - columns["test_accuracy"]
    common = {k: v for k, v in results[0]["settings"].items() if k not in ("rho", "m", "seed")}
    return Found(settings, seeds, sizes, columns, common)


class Correlation(NamedTuple):
    """Of the m-sharpness of one size with a target, and by how much it is above that of the smallest size."""

    size: int
    value: Interval
    above_smallest: Interval


def correlations(found: Found, target: str) -> list[Correlation]:
    goal = found.columns[target]
    resamples = Resamples(np.isfinite(goal))
    smallest = found.columns[f"sharpness_{found.sizes[0]}"]
    rows = []
    for m in found.sizes:
        here = found.columns[f"sharpness_{m}"]
        rows.append(Correlation(m, resamples.correlation(here, goal), resamples.difference(here, smallest, goal)))
    return rows


def report(found: Found, ranked: dict[str, list[Correlation]]) -> str:
    """Markdown tables: settings, and correlations."""
    lines = ["| | test error % | less SGD's | training loss | gap |", "| --- | --- | --- | --- | --- |"]
    for setting in found.settings:
        less = f"{found.against_sgd('test_error', setting):+.2f}" if setting[0] else "-"
        cells = [f"{found.interval(key, setting):.3g}" for key in ("train_loss", "gap")]
        error = f"{found.interval('test_error', setting):.1f}"
        lines.append(f"| {label(*setting)} | {error} | {less} | {cells[0]} | {cells[1]} |")
    lines += ["", "| m-sharpness | " + " | ".join(f"with the {t} | less that of m = {found.sizes[0]}" for t in
                                                  TARGETS.values()) + " |", "| --- " * 5 + "|"]  # fmt: skip
    for i, m in enumerate(found.sizes):
        rows = [ranked[target][i] for target in TARGETS]
        cells = [f"{row.value:+.2f} | {'-' if i == 0 else f'{row.above_smallest:+.2f}'}" for row in rows]
        lines.append(f"| m = {m} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{len(found.settings)} settings x {len(found.seeds)} seeds, 95 % intervals: t for means, bootstrap over "
        "settings and seeds for rank correlations.",
    ]
    return "\n".join(lines) + "\n"


# ---- figures ----


def plot(found: Found, ranked: dict[str, list[Correlation]], path: Path) -> None:
    """Test error against m; gap against the m-sharpness of the smallest and the largest m; correlations."""
    radii = sorted({rho for rho, _ in found.settings if rho})
    colors = dict(zip(radii, shades(len(radii)), strict=True))
    with styled():
        fig = figure(18, 5)
        fig.suptitle(f"m-SAM: seeds {' '.join(map(str, found.seeds))}, bars and bands: 95 % intervals", fontsize=14)
        error, small, large, rank = fig.subplots(1, 4)
        sgd = found.interval("test_error", (0.0, None))
        error.axhline(sgd.value, color=INK, linestyle="--", label="SGD")
        error.axhspan(sgd.low, sgd.high, color=INK, alpha=0.08, linewidth=0)
        for shift, rho in zip(np.geomspace(0.95, 1.05, len(radii)) if len(radii) > 1 else [1.0], radii, strict=True):
            ms = [m for r, m in found.settings if r == rho]
            intervals = [found.interval("test_error", (rho, m)) for m in ms]
            x = [shift * m for m in ms if m is not None]
            error.plot(x, [i.value for i in intervals], "o-", color=colors[rho], label=rf"$\rho$ = {rho:g}")
            for place, i in zip(x, intervals, strict=True):
                error.plot([place] * 2, [i.low, i.high], color=colors[rho], linewidth=2.4)
        error.set_xscale("log")
        error.set_xticks(sorted({m for _, m in found.settings if m}))
        error.xaxis.set_major_formatter("{x:g}")
        error.minorticks_off()
        error.set_xlabel("m, samples that share a perturbation")
        error.set_ylabel("test error (%)")
        error.legend()
        for axes, m in ((small, found.sizes[0]), (large, found.sizes[-1])):
            for i, (rho, _) in enumerate(found.settings):
                color = colors[rho] if rho else INK
                axes.plot(found.columns[f"sharpness_{m}"][i], found.columns["gap"][i], "o", color=color, markersize=6)
            axes.set_xlabel(f"m-sharpness, m = {m} (nats)")
        small.set_ylabel("gap: test - training loss (nats)")
        for shift, (target, name), color in zip((-0.1, 0.1), TARGETS.items(), ("C0", "C1"), strict=True):
            for i, row in enumerate(ranked[target]):
                named = {"label": f"with the {name}"} if i == 0 else {}
                estimate(rank, i + shift, row.value, color, **named)
        rank.set_xticks(range(len(found.sizes)), list(map(str, found.sizes)))
        rank.axhline(0, color=INK, linewidth=0.8)
        rank.set_ylim(-1.05, 1.05)
        rank.set_xlabel("m of the m-sharpness")
        rank.set_ylabel("rank correlation")
        rank.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
        save(fig, path)


def evaluate_all(out: Path) -> None:
    """Read every finished run in ``out``, and write the figure, ``summary.json`` and ``summary.md``."""
    found = collect(out)
    ranked = {target: correlations(found, target) for target in TARGETS}
    summary = {
        "settings": found.common,
        "seeds": found.seeds,
        "runs": {label(*s): {key: found.interval(key, s)._asdict() for key in found.columns} for s in found.settings},
        "correlation": {
            target: {
                str(row.size): {"value": row.value._asdict(), "above_smallest": row.above_smallest._asdict()}
                for row in rows
            }
            for target, rows in ranked.items()
        },
    }
    write_summary(out, summary, report(found, ranked))
    plot(found, ranked, out / "m_sam.png")


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    common_flags(parser, "out/m_sam")
    training_flags(parser, "more seeds, epochs and m, and more to measure with")
    cifar10_flag(parser, "--data")
    size_flags(
        parser,
        {
            "seeds": "seeds of each setting",
            "epochs": "passes over the training images",
            "train": "training images",
            "test": "test images",
            "measured": "training images on which sharpness is measured",
            "batch": "batch size",
            "lr": "learning rate at the start",
            "momentum": "of SGD",
            "m": "samples that share a perturbation in training",
            "rho": "radii in training",
            "sizes": "samples in a group where sharpness is measured",
            "radius": "of the sharpness that is measured",
            "groups": "of each size that are measured, at most",
        },
        Size(),
    )
    args = parser.parse_args(argv)
    args.size = size_of(args, Size(), FULL)
    if not all(rho > 0.0 for rho in args.size.rho):
        parser.error("argument --rho: every radius must be > 0; SGD is run anyway")
    for m in args.size.m:
        if args.size.batch % m:
            parser.error(f"argument --m: {m} given; it must divide the batch size, {args.size.batch}")
    if len(args.size.m) * len(args.size.rho) < 2:
        parser.error("argument --m: with SGD a rank correlation needs three settings; give more m, or more --rho")
    return args


def run(args: argparse.Namespace) -> None:
    """Train what is missing, then evaluate everything."""
    if not args.plot_only:
        source = Source.of(args, ["cifar10"])
        check_images(args.size)
        cifar10(source, args.size.train, args.size.test)  # errors come early, decoded once
        perform(args.out, plan(args.size, args.seed), partial(trained, source), args.jobs, "m-SAM")
    evaluate_all(args.out)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
