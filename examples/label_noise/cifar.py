"""How well does training bear wrong labels? CIFAR-10 with 20 to 80 % of them wrong: SGD, Mixup, SAM, and bootstrap.

The experiment of Foret et al. 2020 (arXiv 2010.01412, section 3.3 and table 4) at the size of two cores. A fixed part
of the training labels is wrong (``flatmin.LabelNoise(...).wrap``), the test labels are right. Every method gets the
same number of gradients: SAM takes two for a step, so SGD and Mixup get twice the epochs. "bootstrap+sam" is trained
from scratch on the labels that the run "sam" of the same seed predicts at its end; that run is made first and comes on
top. Reported: test accuracy at the last epoch and at the best one, and how many of the wrong labels the network has
fitted.

    python examples/label_noise/cifar.py --data ARCHIVE --out out/cifar-noise
    python examples/label_noise/cifar.py --out out/cifar-noise --plot-only

An interrupted command goes on where it was stopped. ``--full`` is ResNet-32 on all of CIFAR-10; ``--device cuda`` then.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _noisy_tables import plot_curves, plot_summary, report, tabulate
from _noisy_training import CLASSES, Mixup, ResNet, batches, cosine, make_optimizer, normalised, predict, train_epoch
from torch import Tensor
from torch.utils.data import TensorDataset

import flatmin
from _common.errors import UsageError
from _common.files import read_json, write_summary
from _common.flags import (
    at_least_0,
    cifar10_flag,
    common_flags,
    main,
    positive_int,
    size_flags,
    size_of,
    training_flags,
)
from _common.images import Source
from _common.runs import Log, Run, perform, results_in, seed_of

BOOTSTRAP = "bootstrap+"
METHODS = ("sgd", "mixup", "sam", "bootstrap+sgd", "bootstrap+mixup", "bootstrap+sam")
KINDS = ("exclude_true", "uniform", "pair", "cifar10")


class Size(NamedTuple):
    """How much is trained. 0 images are all that there are."""

    seeds: int
    epochs: int  # of SAM; the others get twice as many
    every: int  # of SAM's epochs between two evaluations: as many evaluations for every method, after as many gradients
    train: int
    test: int
    depth: int
    width: int
    shrink: int  # squares of so many pixels become one
    crop: bool


HOUR = Size(seeds=3, epochs=20, every=2, train=4000, test=2000, depth=8, width=16, shrink=2, crop=False)
FULL = Size(seeds=3, epochs=200, every=5, train=0, test=0, depth=32, width=16, shrink=1, crop=True)
WATCHED = 500  # wrong labels that are looked at during training; at its end all are


# ---- one run ----


def seen_labels(clean: Tensor, s: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The labels that the data set states, and where they are wrong."""
    generator = torch.Generator().manual_seed(seed_of("labels", s["noise"], s["seed"]))
    noise = flatmin.LabelNoise(CLASSES, s["noise"], s["kind"], generator=generator)
    noisy = noise.wrap(TensorDataset(torch.zeros(len(clean)), clean), progress=False)
    return noisy.targets, noisy.flipped


def share(hits: Tensor) -> float:
    """In percent; NaN of nothing."""
    return 100.0 * float(hits.double().mean())


class Trainer:
    """What :func:`_common.runs.perform` calls in each process: it knows where data and finished runs lie."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source

    def __call__(self, run: Run, log: Log) -> dict[str, Any]:
        s = run.settings
        train, test = self.source.images("cifar10")
        train, test = train.part(0, s["train"]), test.part(0, s["test"])
        x, test_x, test_y = (
            normalised(train.pixels, s["shrink"]),
            normalised(test.pixels, s["shrink"]),
            test.labels.cpu(),
        )
        clean = train.labels.cpu()
        stated, wrong = seen_labels(clean, s)
        targets = self.predicted_by(s["teacher"], len(clean)) if s["teacher"] else stated
        watched = wrong.nonzero().flatten()[:WATCHED]
        steps = max(s["train"] // s["batch"], 1)

        torch.manual_seed(seed_of("weights", s["seed"]))
        model = ResNet(s["depth"], s["width"]).to(s["device"], memory_format=torch.channels_last)
        optimizer = make_optimizer(model, s["rho"], s["weight_decay"])
        state = log.restore(model, optimizer)
        epochs: list[dict[str, Any]] = state.get("epochs", [])
        for epoch in range(state["epoch"] + 1, s["epochs"] + 1):
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(seed_of("order", s["seed"], epoch))
            stream = batches(x, targets.to(x.device), s["batch"], s["crop"], generator)
            mixup = Mixup(s["alpha"], seed_of("mixup", s["seed"], epoch))
            rates = [cosine(s["lr"], (epoch - 1) * steps + i, s["epochs"] * steps) for i in range(steps)]
            loss = train_epoch(model, optimizer, stream, mixup, iter(rates))
            row = {"epoch": epoch, "gradients": epoch * steps * s["passes"], "loss": loss}
            if epoch % s["every"] == 0 or epoch == s["epochs"]:
                row["accuracy"] = share(predict(model, test_x) == test_y)
                row["fitted"] = share(predict(model, x[watched.to(x.device)]) == stated[watched])
            epochs.append(row | {"seconds": time.perf_counter() - start})
            log.keep(epoch, model, optimizer, epochs=epochs)
        predicted = predict(model, x)
        return {
            "epochs": epochs,
            "last": epochs[-1]["accuracy"],
            "best": max(row["accuracy"] for row in epochs if "accuracy" in row),
            "fitted": share(predicted[wrong] == stated[wrong]),
            "recovered": share(predicted[wrong] == clean[wrong]),
            "labels_right": share(targets == clean),
            "predicted": "".join(map(str, predicted.tolist())),
        }

    def predicted_by(self, teacher: str, count: int) -> Tensor:
        """What the finished run ``teacher`` says of the training images."""
        found = read_json(self.folder / "runs" / f"{teacher}.json")["predicted"]
        if len(found) != count:
            raise UsageError(f"{teacher}: has labels of {len(found)} images, but there are {count}; give another --out")
        return torch.tensor([int(digit) for digit in found])


# ---- all runs ----


def make_run(args: argparse.Namespace, method: str, noise: float, seed: int) -> Run:
    """The settings of one run. A run of bootstrap names the run that relabels for it."""
    size: Size = args.size
    trained = method.removeprefix(BOOTSTRAP)
    passes = 2 if trained == "sam" else 1
    rho = args.rho if args.rho is not None else (0.05 if noise >= 0.8 else 0.1)
    settings = {
        "method": method,
        "noise": noise,
        "kind": args.kind,
        "seed": seed,
        "teacher": run_name(trained, noise, seed) if method.startswith(BOOTSTRAP) else "",
        "epochs": size.epochs * 2 // passes,
        "every": size.every * 2 // passes,
        "passes": passes,
        "rho": rho if trained == "sam" else 0.0,
        "alpha": args.alpha if trained == "mixup" else 0.0,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "batch": args.batch,
        "device": args.device,
        **{key: getattr(size, key) for key in ("train", "test", "depth", "width", "shrink", "crop")},
    }
    return Run(run_name(method, noise, seed), settings)


def run_name(method: str, noise: float, seed: int) -> str:
    return f"noise{noise:g}-{method}-seed{seed}"


def stages(args: argparse.Namespace, seed: int) -> list[list[Run]]:
    """The runs of one seed: those on the stated labels, then those on labels that these predict."""
    plain = {method.removeprefix(BOOTSTRAP) for method in args.method}
    first = [method for method in METHODS if method in plain]
    second = [method for method in METHODS if method in args.method and method.startswith(BOOTSTRAP)]
    return [[make_run(args, m, noise, seed) for noise in args.noise for m in part] for part in (first, second) if part]


def evaluate_all(args: argparse.Namespace) -> None:
    """Read every finished run in ``--out``, and write figures, ``summary.json`` and ``summary.md``."""
    table = tabulate(results_in(args.out), METHODS)
    write_summary(args.out, table.as_dict(), report(table))
    plot_summary(table, args.out / "cifar.png")
    plot_curves(table, args.out / "cifar_curves.png")
    print(f"{args.out / 'cifar.png'}, {args.out / 'cifar_curves.png'}, {args.out / 'summary.json'}")


# ---- command line ----


def probability(text: str) -> float:
    """argparse type."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} given, but it is a share in [0, 1]: 0.2 for 20 %")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_flags(parser, "out/cifar-noise")
    add = parser.add_argument
    training_flags(
        parser,
        "the size of the paper, ResNet-32, 200 epochs of SAM and 400 of the others, all images, random crops, instead "
        "of an hour on two cores",
    )
    cifar10_flag(parser, "--data", "--cifar10")
    add(
        "--noise", type=probability, nargs="+", default=[0.2, 0.4, 0.6, 0.8], metavar="P", help="shares of wrong labels"
    )
    add("--kind", choices=KINDS, default="exclude_true", help="what a wrong label is, see docs/label-noise.md")
    add("--method", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "bootstrap+sgd"], metavar="M",
        help=f"of {', '.join(METHODS)} (all but bootstrap+sgd)")  # fmt: skip
    add("--rho", type=at_least_0, metavar="RHO", help="radius of SAM (0.1; from 80 %% noise on 0.05)")
    add("--alpha", type=at_least_0, default=8.0, metavar="A", help="of Mixup's law Beta(A, A) (8)")
    add("--lr", type=at_least_0, default=0.1, help="first learning rate, which falls to 0 along a cosine (0.1)")
    add("--weight-decay", type=at_least_0, default=5e-4, metavar="WD", help="(0.0005)")
    add("--batch", type=positive_int, default=128, metavar="N", help="images in a batch (128)")
    size_flags(
        parser,
        {
            "seeds": "runs of each setting",
            "epochs": "passes of SAM over the training images, the others make twice as many",
            "every": "epochs of SAM between two evaluations",
            "train": "training images",
            "test": "test images",
            "depth": "of the ResNet, 6 n + 2",
            "width": "channels of its first stage",
            "shrink": "squares of so many pixels become one, of 32x32",
        },
        HOUR,
    )
    add(
        "--crop", action=argparse.BooleanOptionalAction, help="random crops as well as mirrored images (no; --full yes)"
    )
    args = parser.parse_args(argv)
    args.size = size_of(args, HOUR, FULL)
    if args.size.depth % 6 != 2 or args.size.depth < 8:
        parser.error(f"argument --depth: {args.size.depth} given, but it is 6 n + 2: 8, 14, 20, 26, 32, ...")
    if args.size.shrink not in (1, 2, 4, 8):
        parser.error(f"argument --shrink: {args.size.shrink} given, but it is 1, 2, 4 or 8")
    if args.size.shrink == 8 and 1 in (args.batch, args.size.train):
        parser.error("argument --batch: one image of 4x4 pixels has no statistics for BatchNorm; give 2 or more")
    if args.size.epochs < args.size.every:
        parser.error(f"argument --every: {args.size.every} given, but there are {args.size.epochs} epochs")
    for name in ("noise", "method"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"argument --{name}: a value is given twice")
    return args


def run(args: argparse.Namespace) -> None:
    """Train what is missing, seed by seed, then evaluate everything."""
    if not args.plot_only:
        source = Source.of(args, ["cifar10"])
        images = source.images("cifar10")  # here and not in the processes: errors come early, images are decoded once
        counts = {"train": len(images[0].labels), "test": len(images[1].labels)}
        args.size = args.size._replace(**{k: n for k, n in counts.items() if not getattr(args.size, k)})
        for key, count in counts.items():
            if getattr(args.size, key) > count:
                raise UsageError(f"--{key}: {getattr(args.size, key)} given, but the data holds {count} images")
        start, count = time.perf_counter(), 0
        for seed in range(args.seed, args.seed + args.size.seeds):
            for part in stages(args, seed):
                count += len(part)
                what = "relabelled, " if part[0].settings["teacher"] else ""
                perform(args.out, part, Trainer(args.out, source), args.jobs, f"{what}seed {seed}")
        print(f"{count} runs, {math.ceil((time.perf_counter() - start) / 60)} min")
    evaluate_all(args)


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
