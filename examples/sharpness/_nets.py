"""What m_sam.py and spectra.py train, and how: a net without BatchNorm on CIFAR-10.

The training data are first images of the training set in an order of their own, the same for every run. A seed decides
on initial weights and on the order of the batches, so that runs of one seed differ by their method alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from _common.errors import UsageError
from _common.images import Source, normalised
from _common.runs import Log, Run, seed_of

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


def cifar10(source: Source, train: int, test: int) -> Data:
    """The first images of both parts, in random order."""
    found = (part.part(0, n) for part, n in zip(source.images("cifar10"), (train, test), strict=True))
    return Data(*((normalised("cifar10", part.pixels), part.labels) for part in found))


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
    torch.manual_seed(seed_of("weights", s["seed"]))
    model = ConvNet().to(data.train[0].device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=s["lr"], momentum=s["momentum"])
    if s["rho"]:
        optimizer = flatmin.SAM(optimizer, rho=s["rho"])
    state = log.restore(model, optimizer)
    rows: list[dict[str, Any]] = state.get("rows", [])

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
        log.keep(epoch, model, optimizer, rows=rows)
    return {"epochs": rows}


def check_images(size: Any) -> None:
    """Errors of sizes that go together."""
    if size.measured > size.train:
        raise UsageError(f"--measured {size.measured}: more than the {size.train} training images; ask for fewer")
    if size.batch > size.train:
        raise UsageError(f"--batch {size.batch}: more than the {size.train} training images; ask for fewer")
