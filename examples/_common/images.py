"""What the experiments train on: MNIST and CIFAR-10.

MNIST is read by examples/mnist_data.py. CIFAR-10 is read from an archive or a folder of images sorted into
``train/<class>/`` and ``test/<class>/``, or from torchvision's own files. Decoded images are kept in a cache, since
12,000 JPEG files take five seconds.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mnist_data

from .errors import UsageError
from .files import in_one_step

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Mean and standard deviation of the training pixels, scaled to [0, 1], of each channel.
MOMENTS = {
    "mnist": ((mnist_data.MEAN,), (mnist_data.STD,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


class Images(NamedTuple):
    """Images uint8 [N, channels, height, width], and their labels int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def part(self, start: int, count: int) -> Images:
        """``count`` images from ``start`` on."""
        if start + count > len(self.labels):
            raise UsageError(f"{start + count} images asked for, but the data holds {len(self.labels)}; ask for fewer")
        return Images(self.pixels[start : start + count], self.labels[start : start + count])


def normalised(task: str, pixels: Tensor) -> Tensor:
    """Bytes [N, channels, height, width] as floats; over the training set each channel has mean 0 and deviation 1."""
    mean, std = (torch.tensor(m, device=pixels.device).view(1, -1, 1, 1) for m in MOMENTS[task])
    return (pixels / 255 - mean) / std


class Batches:
    """Normalised batches ``(x, y)`` of images that lie on the device as bytes.

    With ``order`` (a permutation) they come in that order, else in the order of the data.
    """

    def __init__(self, task: str, images: Images, size: int, order: Tensor | None = None) -> None:
        self.task, self.images, self.size, self.order = task, images, size, order

    def __len__(self) -> int:
        return -(-len(self.images.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.images.labels)) if self.order is None else self.order
        for index in order.to(self.images.labels.device).split(self.size):
            yield normalised(self.task, self.images.pixels[index]), self.images.labels[index]


def shuffled(images: Images, seed: int) -> Images:
    """The same images in an order that depends on ``seed``: archives and folders are sorted by class."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    return Images(images.pixels[order], images.labels[order])


# ---- reading ----


def load(task: str, source: Path | None, cache: Path) -> tuple[Images, Images]:
    """Training and test images of "mnist" or "cifar10".

    Args:
        source: MNIST's folder of .gz files; CIFAR-10's archive, or folder of images or of torchvision's files. None
            lets torchvision download to ``./data``.
        cache: folder for decoded images; made if it is missing.
    """
    if task == "mnist":
        return _load_mnist(source)
    if source is None or (source / "cifar-10-batches-py").is_dir():
        return _from_torchvision(source)
    if not source.exists():
        raise UsageError(f"--cifar10 {source}: no such file or folder; give the archive, or leave it out to download")
    stamp = [str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns]
    kept = cache / "cifar10.pt"
    if kept.is_file():
        found = torch.load(kept, weights_only=True)
        if found["stamp"] == stamp:
            return Images(*found["train"]), Images(*found["test"])
    train, test = _read_images(source)
    with in_one_step(kept) as partial:
        torch.save({"stamp": stamp, "train": tuple(train), "test": tuple(test)}, partial)
    return train, test


@lru_cache(maxsize=2)
def shuffled_images(task: str, source: str, cache: str, device: str, seed: int) -> tuple[Images, Images]:
    """:func:`load` in random order on a device, once in each process. ``source`` may be empty, for None."""
    parts = load(task, Path(source) if source else None, Path(cache))
    train, test = (shuffled(part, seed) for part in parts)
    return Images(*(t.to(device) for t in train)), Images(*(t.to(device) for t in test))


class Source(NamedTuple):
    """Where the images lie and where they go: what the processes that train are told.

    ``paths`` are those of :func:`load`, by task; "" stands for None.
    """

    paths: dict[str, str]
    cache: str
    device: str

    @classmethod
    def of(cls, args: argparse.Namespace, tasks: Iterable[str]) -> Source:
        """As the flags say."""
        given = {task: getattr(args, task) for task in tasks}
        paths = {task: str(path) if path else "" for task, path in given.items()}
        return cls(paths, str(args.out / "cache"), args.device)

    def images(self, task: str) -> tuple[Images, Images]:
        """Training and test images of a task, in an order of their own that is the same for every run."""
        return shuffled_images(task, self.paths[task], self.cache, self.device, 0)


def _load_mnist(folder: Path | None) -> tuple[Images, Images]:
    if folder is not None and (folder / "MNIST" / "raw").is_dir():  # where torchvision puts the same files
        folder = folder / "MNIST" / "raw"
    data = mnist_data.download() if folder is None else mnist_data.from_folder(folder)
    train, test = (Images(pixels.unsqueeze(1), labels) for pixels, labels in (data.train, data.test))
    return train, test


def _from_torchvision(folder: Path | None) -> tuple[Images, Images]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UsageError(
            f"torchvision, which reads its CIFAR-10, cannot be imported ({error}); install it (pip install "
            "torchvision), or give an archive or a folder of images: --cifar10 PATH"
        ) from error
    try:
        parts = [datasets.CIFAR10(str(folder or "./data"), train=t, download=folder is None) for t in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"CIFAR-10 could not be read ({reason}); give an archive: --cifar10 PATH") from error
    train, test = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every image in an archive or below a folder."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix in (".jpg", ".jpeg", ".png"):
                yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and member.name.endswith((".jpg", ".jpeg", ".png")):
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(f"{source}: cannot be read as a tar archive ({error}); is it the right file?") from error


def _read_images(source: Path) -> tuple[Images, Images]:
    """The images of ``train/<class>/`` and ``test/<class>/`` anywhere in ``source``, in the order of their paths."""
    try:
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UsageError(f"CIFAR-10's images need Pillow and numpy ({error}); pip install pillow numpy") from error
    found: dict[str, list[tuple[str, Tensor, int]]] = {"train": [], "test": []}
    for name, content in _members(source):
        parts = name.split("/")
        if len(parts) < 3 or parts[-3] not in found or parts[-2] not in CIFAR_CLASSES:
            continue
        try:
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{source}: {name} cannot be read as an image ({error})") from error
        if pixels.shape[1:] != (32, 32):
            raise UsageError(f"{source}: {name} has {pixels.shape[2]}x{pixels.shape[1]} pixels, expected 32x32")
        found[parts[-3]].append((name, pixels, CIFAR_CLASSES.index(parts[-2])))
    for part, images in found.items():
        if not images:
            raise UsageError(f"{source}: no images in {part}/<class>/, with classes {', '.join(CIFAR_CLASSES)}")
        images.sort(key=lambda image: image[0])
    train, test = (
        Images(torch.stack([p for _, p, _ in images]), torch.tensor([label for _, _, label in images]))
        for images in found.values()
    )
    return train, test
