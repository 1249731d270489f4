"""What the experiments of this folder share: a net without BatchNorm, how it is trained, and the parts of
examples/pacgen that keep runs, read images and draw.

The training data are first images of the training set in an order of their own, the same for every run. A seed decides
on initial weights and on the order of the batches, so that runs of one seed differ by their method alone.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pacgen"))

from _network import Net, evaluate

import flatmin
from _common.errors import UsageError
from _common.figures import INK, figure, save, shades, styled
from _common.images import MOMENTS, TITLES, Batches, Images, shuffled_images
from _common.intervals import Array, Interval, Resamples, mean_interval
from _common.runs import (
    Log,
    Run,
    common_flags,
    main,
    perform,
    positive_int,
    read_json,
    seed_of,
    training_flags,
    write_json,
)

__all__ = [
    "INK",
    "TITLES",
    "Array",
    "Batches",
    "Data",
    "Images",
    "Interval",
    "Log",
    "Net",
    "Resamples",
    "Run",
    "UsageError",
    "check_images",
    "cifar10",
    "cifar_flags",
    "common_flags",
    "evaluate",
    "figure",
    "finished",
    "main",
    "mean_interval",
    "perform",
    "read_json",
    "save",
    "shades",
    "shuffled_images",
    "size_flags",
    "size_of",
    "styled",
    "train",
    "training_flags",
    "write_json",
]

Pair = tuple[Tensor, Tensor]


class ConvNet(nn.Sequential):
    """Three convolutions with stride 2 and a linear layer: 19,466 parameters, for images of 3x32x32."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


class Data(NamedTuple):
    """Normalised images and their labels, all on the device."""

    train: Pair
    test: Pair

    def measured(self, count: int) -> Pair:
        """The training images on which curvature and sharpness are measured: the first ones."""
        return self.train[0][:count], self.train[1][:count]


def normalised(task: str, images: Images) -> Pair:
    mean, std = (torch.tensor(m, device=images.pixels.device).view(1, -1, 1, 1) for m in MOMENTS[task])
    return (images.pixels / 255 - mean) / std, images.labels


def cifar10(source: str, cache: str, device: str, train: int, test: int) -> Data:
    """The first images of both parts, in random order. ``source`` may be empty: then torchvision downloads them."""
    parts = shuffled_images("cifar10", source, cache, device, 0)
    return Data(*(normalised("cifar10", part.part(0, n)) for part, n in zip(parts, (train, test), strict=True)))


@torch.no_grad()
def fit(model: nn.Module, data: Data) -> dict[str, float]:
    """Losses in nats, accuracies in percent, and the gap: test loss less training loss."""
    model.eval()
    found = {}
    for name, (x, y) in (("train", data.train), ("test", data.test)):
        output = torch.cat([model(part) for part in x.split(1000)])
        found[f"{name}_loss"] = float(F.cross_entropy(output, y))
        found[f"{name}_accuracy"] = 100.0 * float((output.argmax(1) == y).double().mean())
    return found | {"gap": found["test_loss"] - found["train_loss"]}


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Pair, order: Tensor, batch: int, m: int | None
) -> None:
    """One pass in ``order``; samples that do not fill a batch are left out.

    Args:
        m: samples that share a perturbation of SAM, a divisor of ``batch``; None for plain SGD.
    """
    model.train()
    for index in order.split(batch):
        if len(index) < batch:
            break
        x, y = data[0][index], data[1][index]
        optimizer.zero_grad()
        if m is None:
            F.cross_entropy(model(x), y).backward()
        else:
            pieces = list(zip(x.split(m), y.split(m), strict=True))

            def loss_of(i: int, pieces: list[Pair] = pieces) -> Tensor:
                return F.cross_entropy(model(pieces[i][0]), pieces[i][1])

            optimizer.backward(loss_of, m=len(pieces))
        optimizer.step()


def train(run: Run, log: Log, data: Data, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
    """Train as the settings say: SGD with momentum, its rate a half cosine over the epochs, alone or in SAM.

    ``measure`` is called at the epochs in ``settings["measured_at"]``, 0 being the initial weights; what it returns
    belongs to the result, beside losses and accuracies.
    """
    s = run.settings
    state = log.resume()
    torch.manual_seed(seed_of("weights", s["seed"]))
    model = ConvNet().to(data.train[0].device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=s["lr"], momentum=s["momentum"])
    if s["rho"]:
        optimizer = flatmin.SAM(optimizer, rho=s["rho"])
    rows: list[dict[str, Any]] = state.get("rows", [])
    if state["epoch"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def look(epoch: int) -> None:
        if epoch in s["measured_at"]:
            start = time.perf_counter()
            found = {"epoch": epoch, **fit(model, data), **measure(model.eval())}
            rows.append(found | {"seconds": time.perf_counter() - start})

    if not state["epoch"]:
        look(0)
    for epoch in range(state["epoch"] + 1, s["epochs"] + 1):
        generator = torch.Generator().manual_seed(seed_of("order", s["seed"], epoch))
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * s["lr"] * (1.0 + math.cos(math.pi * (epoch - 1) / s["epochs"]))
        order = torch.randperm(s["train"], generator=generator)
        train_epoch(model, optimizer, data.train, order, s["batch"], s["m"] if s["rho"] else None)
        look(epoch)
        log.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows})
    return {"epochs": rows}


def size_flags(parser: argparse.ArgumentParser, default: Any, meanings: dict[str, str]) -> None:
    """``--full``, and a flag for each number of ``default``, a NamedTuple of sizes."""
    parser.add_argument("--full", action="store_true", help="larger; what other flags say still counts")
    for name, meaning in meanings.items():
        value = getattr(default, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        real = isinstance(value[0] if isinstance(value, tuple) else value, float)
        parser.add_argument(
            f"--{name}",
            type=float if real else positive_int,
            nargs="+" if isinstance(value, tuple) else None,
            metavar="X" if real else "N",
            help=f"{meaning} ({shown})",
        )


def size_of(args: argparse.Namespace, default: Any, full: Any) -> Any:
    """``default``, or ``full`` with ``--full``, with the numbers that the flags of :func:`size_flags` gave."""
    given = {name: getattr(args, name) for name in default._fields if getattr(args, name) is not None}
    size = full if args.full else default
    return size._replace(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def cifar_flags(parser: argparse.ArgumentParser) -> None:
    """Where the images are and how they are worked on, for scripts that train on CIFAR-10 alone."""
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="CIFAR-10: archive or folder with train/<class>/ and test/<class>/, or torchvision's folder "
        "(downloaded to ./data)",
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=jobs, metavar="N", help=f"runs at a time, each on one thread ({jobs})"
    )
    parser.add_argument("--device", default="cpu", help="where to train (cpu)")


def check_images(size: Any) -> None:
    """Errors of sizes that go together."""
    if size.measured > size.train:
        raise UsageError(f"--measured {size.measured}: more than the {size.train} training images; ask for fewer")
    if size.batch > size.train:
        raise UsageError(f"--batch {size.batch}: more than the {size.train} training images; ask for fewer")


def finished(results: Sequence[dict[str, Any]], out: Path) -> None:
    if not results:
        raise UsageError(f"--out {out}: no finished runs; run without --plot-only")
