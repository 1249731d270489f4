"""What sweeps.py and perturbed_opt.py train, and how: the network of the PyTorch MNIST example as of July 2018."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _common.images import Batches


class Net(nn.Module):
    """The network of pytorch/examples' MNIST as of July 2018, the time of the paper: two convolutions, two linear
    layers. 21,840 parameters for MNIST; CIFAR-10's three channels of 32x32 make 31,340.

    The example drops half of the units after the second convolution and after the first linear layer; ``dropout``
    says how many, and is 0 by default: the paper's sweeps do not seem to use it.
    """

    def __init__(self, task: str, dropout: float = 0.0) -> None:
        super().__init__()
        channels, features = {"mnist": (1, 320), "cifar10": (3, 500)}[task]
        self.conv1 = nn.Conv2d(channels, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.drop2d, self.drop = nn.Dropout2d(dropout), nn.Dropout(dropout)
        self.fc1 = nn.Linear(features, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities [N, 10] of normalised images."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop2d(self.conv2(x)), 2)).flatten(1)
        return F.log_softmax(self.fc2(self.drop(F.relu(self.fc1(x)))), dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss in nats, and accuracy in percent, without dropout."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for x, y in batches:
        output = model(x)
        loss += F.nll_loss(output, y, reduction="sum").item()
        correct += int((output.argmax(dim=1) == y).sum())
        seen += len(y)
    return loss / seen, 100.0 * correct / seen


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    watch: Callable[[], None] = lambda: None,
) -> float:
    """One pass; under the noise of the optimizer, if it is a :class:`flatmin.PerturbedOPT`. Mean loss of the batches.

    One gradient for each batch either way. ``watch`` is called after every step.
    """
    model.train()
    perturb = getattr(optimizer, "perturb", contextlib.nullcontext)
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for x, y in batches:
        optimizer.zero_grad()
        with perturb():
            loss = F.nll_loss(model(x), y)
            loss.backward()
        optimizer.step()
        watch()
        total += loss.detach().double().cpu() * len(y)
        seen += len(y)
    return float(total) / seen
