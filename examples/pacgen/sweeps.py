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

import torch
from _measures import measure
from _network import Net, evaluate, train_epoch
from _sweep_tables import (
    BATCH,
    RATE,
    SWEEPS,
    at_equal_epoch,
    at_equal_loss,
    plot_by_point,
    plot_summary,
    plot_sweep,
    report,
    tabulate,
)

from _common.errors import UsageError
from _common.files import write_summary
from _common.flags import cifar10_flag, common_flags, main, mnist_flag, size_flags, size_of, training_flags
from _common.images import TITLES, Batches, Images, Source
from _common.runs import Log, Run, perform, results_in, seed_of

MOMENTUM = 0.5


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


# ---- all runs ----


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


def sweep_flags(parser: argparse.ArgumentParser, out: str, full: str) -> None:
    """The flags of an experiment over the four sweeps, but for its sizes; ``full`` says what ``--full`` is."""
    common_flags(parser, out)
    training_flags(parser, full)
    mnist_flag(parser)
    cifar10_flag(parser, "--cifar10")
    names = list(SWEEPS)
    parser.add_argument("--sweeps", nargs="+", choices=names, default=names, help="which of the four (all)")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    full = "the size of the paper, all images, 100 epochs, 5 seeds, instead of an hour on two cores"
    sweep_flags(parser, "out/sweeps", full)
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
