"""Does Perturbed OPT generalise better than the plain optimizer, dropout, and isotropic noise of the same mean size?

SGD on MNIST with 1,000 training images, and Adam on CIFAR-10, with the network of the PyTorch MNIST example. Every
method gets the same number of gradients and the same number of tuning runs: a small grid, judged by held-out training
images that no run trains on. Then several seeds of the best setting of each, judged by the test images. The isotropic
noise has the mean size that Perturbed OPT reported, seed by seed (after Wang et al. 2018, arXiv 1809.07402, section 5;
Perturbed OPT is this project's own definition, see docs/pacgen.md).

    python examples/pacgen/perturbed_opt.py --mnist FOLDER --cifar10 ARCHIVE --out out/perturbed
    python examples/pacgen/perturbed_opt.py --out out/perturbed --plot-only

An interrupted command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from _network import Net, evaluate, train_epoch

import flatmin
from _common.errors import UsageError
from _common.figures import INK, band, estimate, figure, in_figure, save, styled
from _common.files import read_json, write_json
from _common.flags import cifar10_flag, common_flags, main, mnist_flag, size_flags, size_of, training_flags
from _common.images import TITLES, Batches, Source
from _common.intervals import Array, mean_of
from _common.runs import Log, Run, perform, seed_of

METHODS = {
    "plain": "plain optimizer",
    "dropout": "dropout",
    "isotropic": "isotropic noise",
    "perturbed": "Perturbed OPT",
}
COLORS = {"plain": "C7", "dropout": "C0", "isotropic": "C1", "perturbed": "C3"}


class Size(NamedTuple):
    """How much is trained. ``train`` images, then ``holdout`` images for the tuning; 0 test images are all."""

    optimizer: str
    batch: int
    train: int
    holdout: int
    test: int
    epochs: int
    every: int  # epochs between two evaluations
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]  # of the methods without another setting to tune: six
    few_rates: tuple[float, ...]  # of those with one more: three, and two values of the other
    dropouts: tuple[float, ...] = (0.1, 0.3)
    # gamma and scale of Perturbed OPT: the noise is at most gamma |w|, and at most scale / sqrt(curvature). With the
    # first pair the neighbourhood limits almost all of it, with the second the curvature limits a quarter to a half.
    noises: tuple[tuple[float, float], ...] = ((0.1, 1.0), (1.0, 0.1))


HOUR = {
    "mnist": Size("SGD", 64, 1000, 2000, 0, 60, 6, 5, 1, (0.01, 0.02, 0.03, 0.05, 0.1, 0.15), (0.03, 0.05, 0.1)),
    "cifar10": Size("Adam", 128, 5000, 2000, 0, 20, 2, 5, 1, (5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3), (1e-3, 2e-3, 4e-3)),
}
# Not the paper's networks, which were wide residual ones: the same network, trained longer and more often.
FULL = {
    "mnist": HOUR["mnist"]._replace(holdout=10_000, epochs=300, every=10, seeds=20, tuning_seeds=5),
    "cifar10": HOUR["cifar10"]._replace(train=40_000, holdout=10_000, epochs=100, every=5, seeds=10, tuning_seeds=3),
}


# ---- one run ----


def make_optimizer(model: Net, s: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a run, inside :class:`flatmin.PerturbedOPT` for the two methods that train under noise."""
    base: torch.optim.Optimizer
    if s["optimizer"] == "SGD":
        base = torch.optim.SGD(model.parameters(), lr=s["lr"], momentum=0.5)
    else:
        base = torch.optim.Adam(model.parameters(), lr=s["lr"])
    generator = torch.Generator().manual_seed(seed_of("noise", s["seed"]))
    if s["method"] == "perturbed":
        return flatmin.PerturbedOPT(base, gamma=s["gamma"], scale=s["scale"], generator=generator)
    if s["method"] == "isotropic":
        return flatmin.PerturbedOPT(base, sizing="isotropic", scale=s["sigma"], generator=generator)
    return base


class Noise:
    """What the noise was like in the steps of an epoch: means of its size and of the share of capped weights."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self._sums = torch.zeros(2, dtype=torch.float64)

    def watch(self) -> None:
        """Called after every step. The first step of Perturbed OPT has no noise, and counts as 0."""
        self.steps += 1
        if isinstance(self.optimizer, flatmin.PerturbedOPT) and (stats := self.optimizer.noise_stats) is not None:
            self._sums += torch.stack([stats.mean_sigma, stats.capped_fraction]).cpu()

    def means(self) -> dict[str, float]:
        sigma, capped = (self._sums / max(self.steps, 1)).tolist()
        return {"sigma": sigma, "capped": capped}


def trained(source: Source, run: Run, log: Log) -> dict[str, Any]:
    """One run, judged by held-out training images or by the test images, as its settings say."""
    s = run.settings
    images, test = source.images(s["task"])
    train = images.part(0, s["train"])
    judge = images.part(s["train"], s["judged"]) if s["judge"] == "holdout" else test.part(0, s["judged"])
    torch.manual_seed(seed_of("weights", s["seed"]))
    model = Net(s["task"], s["dropout"]).to(source.device)
    optimizer = make_optimizer(model, s)
    state = log.restore(model, optimizer)
    epochs: list[dict[str, Any]] = state.get("epochs", [])
    gradients = state.get("gradients", 0)
    for epoch in range(state["epoch"] + 1, s["epochs"] + 1):
        start = time.perf_counter()
        noise = Noise(optimizer)
        torch.manual_seed(seed_of("dropout", s["seed"], epoch))
        generator = torch.Generator().manual_seed(seed_of("order", s["seed"], epoch))
        order = torch.randperm(s["train"], generator=generator)
        try:
            running = train_epoch(model, Batches(s["task"], train, s["batch"], order), optimizer, noise.watch)
            kept = optimizer.state_dict()
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            return {"epochs": epochs + diverged(s, epoch)}
        gradients += noise.steps
        row = {"epoch": epoch, "gradients": gradients, "running_loss": running, **noise.means()}
        if epoch % s["every"] == 0 or epoch == s["epochs"]:
            for name, part in (("train", train), ("judge", judge)):
                values = evaluate(model, Batches(s["task"], part, 1000))
                row |= dict(zip((f"{name}_loss", f"{name}_accuracy"), values, strict=True))
        epochs.append(row | {"seconds": time.perf_counter() - start})
        state = {"epoch": epoch, "gradients": gradients, "epochs": epochs}
        log.save(state | {"model": model.state_dict(), "optimizer": kept})
    return {"epochs": epochs}


def diverged(s: dict[str, Any], epoch: int) -> list[dict[str, Any]]:
    """The remaining epochs of a run that Perturbed OPT has stopped because a gradient was not finite."""
    steps = -(-s["train"] // s["batch"])
    keys = ("running_loss", "sigma", "capped", "train_loss", "train_accuracy", "judge_loss", "judge_accuracy")
    rows = []
    for e in range(epoch, s["epochs"] + 1):
        kept = keys if e % s["every"] == 0 or e == s["epochs"] else keys[:3]
        rows.append({"epoch": e, "gradients": e * steps, **dict.fromkeys(kept, math.nan), "seconds": 0.0})
    return rows


def last(result: dict[str, Any], key: str) -> float:
    """Value at the end of a run; NaN if it was not finite."""
    value = result["epochs"][-1][key]
    return math.nan if value is None else float(value)


def mean_sigma(result: dict[str, Any]) -> float:
    """Mean size of the noise over all steps of a run."""
    sizes = [row["sigma"] for row in result["epochs"]]
    return math.nan if None in sizes else math.fsum(sizes) / len(sizes)


# ---- tuning, then the comparison ----


def grid(method: str, size: Size, sigma: float) -> list[dict[str, Any]]:
    """The settings that are tried: as many for every method."""
    base = {"dropout": 0.0, "gamma": 0.0, "scale": 0.0, "sigma": 0.0}
    if method == "dropout":
        tried = [{"lr": lr, "dropout": p} for lr in size.few_rates for p in size.dropouts]
    elif method == "perturbed":
        tried = [{"lr": lr, "gamma": gamma, "scale": scale} for lr in size.few_rates for gamma, scale in size.noises]
    else:
        tried = [{"lr": lr, "sigma": sigma if method == "isotropic" else 0.0} for lr in size.rates]
    return [base | entry for entry in tried]


def make_run(task: str, method: str, size: Size, tuned: dict[str, Any], seed: int, judge: str, device: str) -> Run:
    """A run of the tuning (judge "holdout") or of the comparison ("test")."""
    settings = {
        "task": task,
        "method": method,
        "optimizer": size.optimizer,
        "batch": size.batch,
        "train": size.train,
        "judge": judge,
        "judged": size.holdout if judge == "holdout" else size.test,
        "epochs": size.epochs,
        "every": size.every,
        "seed": seed,
        "device": device,
        **tuned,
    }
    # not sigma: it is the one setting that other runs decide
    varied = "-".join(f"{key}{tuned[key]:g}" for key in ("lr", "dropout", "gamma", "scale") if tuned[key])
    return Run(f"{task}-{judge}-{method}-{varied}-seed{seed}", settings)


class Study:
    """Tuning and comparison of one task, stage by stage; what is finished is read back."""

    def __init__(self, args: argparse.Namespace, task: str, size: Size, source: Source) -> None:
        self.args, self.task, self.size, self.train = args, task, size, partial(trained, source)

    def perform(self, runs: Sequence[Run], stage: str) -> list[dict[str, Any]]:
        return perform(self.args.out, runs, self.train, self.args.jobs, f"{TITLES[self.task]}, {stage}")

    def tune(self, methods: Sequence[str], sigma: float, stage: str) -> dict[str, dict[str, Any]]:
        """The grid of each method with the mean held-out accuracy and loss of each entry, and the best entry."""
        # seeds that the comparison does not use
        seeds = [self.args.seed + 1000 + i for i in range(self.size.tuning_seeds)]
        entries = [(method, entry) for method in methods for entry in grid(method, self.size, sigma)]
        runs = [
            make_run(self.task, method, self.size, entry, seed, "holdout", self.args.device)
            for method, entry in entries
            for seed in seeds
        ]
        results = iter(self.perform(runs, stage))
        found: dict[str, dict[str, Any]] = {method: {"grid": []} for method in methods}
        for method, entry in entries:
            made = [next(results) for _ in seeds]
            scores = {key: float(np.mean([last(r, f"judge_{key}") for r in made])) for key in ("accuracy", "loss")}
            sizes = float(np.mean([mean_sigma(r) for r in made]))
            found[method]["grid"].append({"settings": entry, **scores, "mean_sigma": sizes})
        for tuning in found.values():
            # the lower loss where accuracies tie; a run that diverged has NaN and comes last
            key = lambda tried: (-np.nan_to_num(tried["accuracy"], nan=-1.0), np.nan_to_num(tried["loss"], nan=np.inf))  # noqa: E731
            tuning["best"] = min(tuning["grid"], key=key)
        return found

    def run(self) -> None:
        """All stages, then ``<task>.json``."""
        tuning = self.tune(("plain", "dropout", "perturbed"), 0.0, "tuning")
        tuning |= self.tune(("isotropic",), tuning["perturbed"]["best"]["mean_sigma"], "tuning isotropic noise")
        seeds = list(range(self.args.seed, self.args.seed + self.size.seeds))

        def runs(method: str, sigmas: Sequence[float]) -> Iterator[Run]:
            for seed, sigma in zip(seeds, sigmas, strict=True):
                entry = tuning[method]["best"]["settings"] | {"sigma": sigma}
                yield make_run(self.task, method, self.size, entry, seed, "test", self.args.device)

        none = [0.0] * len(seeds)
        first = [run for method in ("perturbed", "plain", "dropout") for run in runs(method, none)]
        results = self.perform(first, "comparison")
        sigmas = [mean_sigma(result) for result in results[: len(seeds)]]
        results += self.perform(list(runs("isotropic", sigmas)), "comparison with isotropic noise")
        counts = {result["epochs"][-1]["gradients"] for result in results}
        assert len(counts) == 1, "every method takes the same number of gradients"
        write_json(
            self.args.out / f"{self.task}.json",
            {"size": self.size._asdict(), "gradients": counts.pop(), "tuning": tuning, "runs": results},
        )


# ---- what the runs say ----


class Comparison(NamedTuple):
    """The final runs of a task as arrays [seeds, evaluated epochs] by method and column."""

    task: str
    study: dict[str, Any]
    epochs: list[int]
    gradients: list[int]
    columns: dict[str, dict[str, Array]]

    def at_end(self, method: str, key: str) -> Array:
        """[seeds]"""
        return self.columns[method][key][:, -1]

    def describe(self, method: str) -> str:
        """The tuned settings in words."""
        s = self.study["tuning"][method]["best"]["settings"]
        names = {"lr": "rate", "dropout": "p", "gamma": "gamma", "scale": "scale"}
        words = [f"{name} {s[key]:g}" for key, name in names.items() if s[key]]
        if method in ("isotropic", "perturbed"):
            words.append(f"mean sigma {np.mean(self.columns[method]['sigma']):.2g}")
        if method == "perturbed":
            words.append(f"{100 * np.mean(self.columns[method]['capped']):.0f} % at the cap")
        return ", ".join(words)


def compare(task: str, study: dict[str, Any]) -> Comparison:
    rows = [row for row in study["runs"][0]["epochs"] if "judge_loss" in row]
    keys = ("train_loss", "train_accuracy", "judge_loss", "judge_accuracy", "sigma", "capped")
    columns: dict[str, dict[str, Array]] = {}
    for method in METHODS:
        made = sorted((r for r in study["runs"] if r["settings"]["method"] == method),
                      key=lambda r: r["settings"]["seed"])  # fmt: skip
        evaluated = [[row for row in r["epochs"] if "judge_loss" in row] for r in made]
        columns[method] = {key: np.array([[row[key] for row in run] for run in evaluated], float) for key in keys}
    return Comparison(task, study, [r["epoch"] for r in rows], [r["gradients"] for r in rows], columns)


def title(c: Comparison) -> str:
    size = c.study["size"]
    return f"{TITLES[c.task]}, {size['train']:,} training images, {size['optimizer']}"


def plot_ends(c: Comparison, path: Path) -> None:
    """Train and test accuracy of every method: each seed, mean and 95 % interval."""
    with styled():
        fig = figure(13, 4.8)
        tried = len(c.study["tuning"]["plain"]["grid"])
        fig.suptitle(f"{title(c)}: {c.study['size']['seeds']} seeds, mean and 95 % interval\n"
                     f"{c.study['gradients']:,} gradients each; tuned on held-out images, "
                     f"{tried} settings for each method", fontsize=13)  # fmt: skip
        panels = fig.subplots(1, 2, sharey=True)
        rows = np.arange(len(METHODS))[::-1]
        for axes, key, name in zip(panels, ("train_accuracy", "judge_accuracy"), ("training", "test"), strict=True):
            for row, method in zip(rows, METHODS, strict=True):
                values = c.at_end(method, key)
                mean = mean_of(values)
                axes.plot(values, np.full(len(values), row), "o", color=COLORS[method], alpha=0.35, markersize=6)
                estimate(axes, row + 0.17, mean, COLORS[method], "D", across=True, linewidth=3, markersize=8)
                axes.annotate(f"{mean.value:.2f} %", (mean.value, row + 0.17), (0, 9), textcoords="offset points",
                              ha="center", color=INK)  # fmt: skip
            axes.set_xlabel(f"{name} accuracy (% of images)")
            axes.set_ylim(-0.5, len(METHODS) - 0.3)
            axes.margins(x=0.12)
        panels[0].set_yticks(
            rows,
            [
                in_figure(f"{label}\n({c.describe(method)})").replace(", mean", ",\nmean")
                for method, label in METHODS.items()
            ],
        )
        save(fig, path)


def plot_curves(c: Comparison, path: Path) -> None:
    """Train and test accuracy by number of gradients."""
    with styled():
        fig = figure(13, 4.8)
        fig.suptitle(f"{title(c)}: mean of {c.study['size']['seeds']} seeds, band: 95 % interval", fontsize=13)
        panels = fig.subplots(1, 2)
        for axes, key, name in zip(panels, ("train_accuracy", "judge_accuracy"), ("training", "test"), strict=True):
            for method, label in METHODS.items():
                band(axes, c.gradients, c.columns[method][key].T, COLORS[method], label)
            axes.set_xlabel("gradient evaluations")
            axes.set_ylabel(f"{name} accuracy (% of images)")
            # early epochs would leave the differences a hair's breadth
            shown = np.concatenate([c.columns[m][key][:, len(c.epochs) // 5 :].ravel() for m in METHODS])
            axes.set_ylim(np.nanmin(shown) - 0.5, min(np.nanmax(shown) + 0.5, 100.4))
        axes.legend(loc="lower right")
        save(fig, path)


def report(c: Comparison) -> str:
    """A markdown table: accuracies, and the differences to the plain optimizer, paired by seed."""
    lines = [
        f"### {title(c)}",
        "",
        "| method | tuned | training accuracy % | test accuracy % | test, less plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    plain = c.at_end("plain", "judge_accuracy")
    for method, label in METHODS.items():
        train, test = (mean_of(c.at_end(method, key)) for key in ("train_accuracy", "judge_accuracy"))
        ahead = f"{mean_of(c.at_end(method, 'judge_accuracy') - plain):+.2f}" if method != "plain" else "-"
        lines.append(f"| {label} | {c.describe(method)} | {train:.2f} | {test:.2f} | {ahead} |")
    size, tried = c.study["size"], len(c.study["tuning"]["plain"]["grid"])
    lines += [
        "",
        f"{size['seeds']} seeds, {c.study['gradients']:,} gradients of {size['batch']} images each; "
        f"{tried} settings tried for each method, {size['tuning_seeds']} seed(s) each, "
        f"judged by {size['holdout']:,} held-out training images.",
        "",
    ]
    return "\n".join(lines)


def evaluate_all(args: argparse.Namespace) -> None:
    """Read ``<task>.json``, and write figures and ``summary.md``."""
    texts = []
    for task in args.tasks:
        comparison = compare(task, read_json(args.out / f"{task}.json"))
        plot_ends(comparison, args.out / f"{task}.png")
        plot_curves(comparison, args.out / f"{task}-curves.png")
        texts.append(report(comparison))
    (args.out / "summary.md").write_text("\n".join(texts))
    print("\n".join(texts))


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Of two numbers the first is for MNIST, the second for CIFAR-10."
    )
    common_flags(parser, "out/perturbed")
    training_flags(
        parser,
        "all images of CIFAR-10, five times the epochs, 10 to 20 seeds, instead of the size of an hour on two cores",
    )
    mnist_flag(parser)
    cifar10_flag(parser, "--cifar10")
    parser.add_argument("--tasks", nargs="+", choices=list(HOUR), default=list(HOUR), help="which of the two (both)")
    size_flags(
        parser,
        {
            "seeds": "seeds of the comparison",
            "tuning-seeds": "seeds of each setting in the tuning",
            "epochs": "passes over the training images",
            "every": "epochs between two evaluations",
            "train": "training images",
            "holdout": "held-out training images",
            "test": "test images",
        },
        *HOUR.values(),
    )
    args = parser.parse_args(argv)
    args.sizes = {task: size_of(args, HOUR[task], FULL[task]) for task in HOUR}
    if any(size.seeds < 2 for size in args.sizes.values()):
        parser.error("argument --seeds: 1 given, but an interval needs at least 2")
    return args


def run(args: argparse.Namespace) -> None:
    """Tune, compare, and evaluate what is there."""
    if not args.plot_only:
        source = Source.of(args, args.tasks)
        studies = []
        for task in args.tasks:  # here and not in the processes: errors come early, images are decoded once
            images, test = source.images(task)
            size = args.sizes[task]
            if size.train + size.holdout > len(images.labels):
                raise UsageError(f"{TITLES[task]}: {size.train} training and {size.holdout} held-out images asked for, "
                                 f"but there are {len(images.labels)}; give --train and --holdout")  # fmt: skip
            size = size._replace(test=size.test or len(test.labels))
            studies.append(Study(args, task, size, source))
        for study in studies:
            study.run()
    evaluate_all(args)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
