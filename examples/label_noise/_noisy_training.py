"""The parts of cifar.py that train: the network, augmentation, Mixup, one epoch, and what a network predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from _common import images

CLASSES = 10


class Block(nn.Module):
    """Two convolutions and the identity beside them; where the size changes, every ``stride``-th pixel of it and zeros
    as the new channels (option A of He et al. 2016, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.new = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        beside = x[:, :, :: self.stride, :: self.stride]
        if self.new:
            beside = F.pad(beside, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + beside)


class ResNet(nn.Module):
    """The ResNet of He et al. 2016 (arXiv 1512.03385, section 4.2) for 32x32 images: ``depth`` is 6 n + 2.

    ResNet-32 with width 16 has 464,154 parameters. Smaller images will do too, from 4x4 on.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth: {depth} given, but it is 6 n + 2: 8, 14, 20, 26, 32, ...")
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                outputs = width << stage
                blocks.append(Block(inputs, outputs, 2 if stage and i == 0 else 1))
                inputs = outputs
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of normalised images [N, 3, height, width]."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def normalised(pixels: Tensor, shrink: int) -> Tensor:
    """uint8 [N, 3, 32, 32] as floats of mean 0 and standard deviation 1, channels last: what convolutions like.

    Squares of ``shrink`` x ``shrink`` pixels become one, their mean.
    """
    x = F.avg_pool2d(images.normalised("cifar10", pixels), shrink)
    return x.contiguous(memory_format=torch.channels_last)


def augmented(x: Tensor, crop: bool, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W], half of them mirrored; with ``crop`` moved by up to an eighth, with zeros at the edge.

    The random numbers come from the CPU, so that they do not depend on the device.
    """
    n, _, height, width = x.shape
    mirror = torch.rand(n, generator=generator) < 0.5
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirror.unsqueeze(1), width - 1 - columns, columns)
    rows = torch.arange(height).expand(n, height)
    if crop:
        most = height // 8
        x = F.pad(x, (most, most, most, most))
        columns = columns + torch.randint(2 * most + 1, (n, 1), generator=generator)
        rows = rows + torch.randint(2 * most + 1, (n, 1), generator=generator)
    picture = torch.arange(n).view(n, 1, 1)
    picture, rows, columns = (t.to(x.device) for t in (picture, rows.unsqueeze(2), columns.unsqueeze(1)))
    return x.permute(0, 2, 3, 1)[picture, rows, columns].permute(0, 3, 1, 2)


class Mixup:
    """Convex combinations of pairs of a batch (Zhang et al. 2018, arXiv 1710.09412): one factor for each batch.

    Args:
        alpha: the factor has the law Beta(alpha, alpha); 0 mixes nothing.
        seed: of the factors and of the pairs.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha, self._rng = alpha, np.random.default_rng(seed)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and targets [N, 10] of which each row sums to 1."""
        target = F.one_hot(y, CLASSES).to(x.dtype)
        if not self.alpha:
            return x, target
        factor = float(self._rng.beta(self.alpha, self.alpha))
        other = torch.from_numpy(self._rng.permutation(len(x))).to(x.device)
        return factor * x + (1 - factor) * x[other], factor * target + (1 - factor) * target[other]


def make_optimizer(model: nn.Module, rho: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, inside :class:`flatmin.SAM` where ``rho`` is not 0."""
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=weight_decay)
    return flatmin.SAM(base, rho=rho, model=model) if rho else base


def cosine(lr: float, step: int, steps: int) -> float:
    """The learning rate of ``step``: from ``lr`` to 0 along half a cosine."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * step / steps))


def batches(x: Tensor, y: Tensor, size: int, crop: bool, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once in random order, augmented. Of the last ones, too few for a batch, none: BatchNorm wants many."""
    order = torch.randperm(len(y), generator=generator)
    size = min(size, len(y))
    for index in order.split(size)[: len(y) // size]:
        index = index.to(x.device)
        yield augmented(x[index], crop, generator), y[index]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[tuple[Tensor, Tensor]],
    mixup: Mixup,
    rates: Iterator[float],
) -> float:
    """One pass over ``stream``, a learning rate of ``rates`` for each step. Mean loss in nats, at the weights."""
    model.train()
    total, steps = torch.zeros((), dtype=torch.float64), 0
    for (x, y), lr in zip(stream, rates, strict=True):
        x, target = mixup(x, y)
        for group in optimizer.param_groups:
            group["lr"] = lr

        def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # SAM calls it twice, with the same images and the same labels
        total += loss.detach().double().cpu()
        steps += 1
    return float(total) / steps


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The class of each image, int64 [N] on the CPU."""
    model.eval()
    return torch.cat([model(part).argmax(1).cpu() for part in x.split(500)])
