"""What the tests of examples/pacgen share: the scripts' modules on the path, and small data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread
from numpy.typing import NDArray
from PIL import Image
from test_mnist import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, digits, write_idx

SCRIPTS = Path(__file__).parents[2] / "examples" / "pacgen"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]  # as `python examples/pacgen/…` and its scripts do

import _measures  # noqa: E402
import _network  # noqa: E402
import _toy_problem  # noqa: E402
import perturbed_opt  # noqa: E402
import sweeps  # noqa: E402
import toy_surface  # noqa: E402

from _common import files as _files  # noqa: E402
from _common import flags as _flags  # noqa: E402
from _common import images as _images  # noqa: E402
from _common import intervals as _intervals  # noqa: E402
from _common import runs as _runs  # noqa: E402
from _common.errors import UsageError  # noqa: E402

__all__ = [
    "SCRIPTS",
    "TINY_SWEEP",
    "Stop",
    "UsageError",
    "_files",
    "_flags",
    "_images",
    "_intervals",
    "_measures",
    "_network",
    "_runs",
    "_toy_problem",
    "assert_picture",
    "perturbed_opt",
    "sweeps",
    "toy_surface",
    "write_classes",
    "write_mnist",
]

#: A sweep of six runs of two epochs.
TINY_SWEEP = [
    "--sweeps", "mnist-batch", "--batches", "16", "32", "64", "--seeds", "2", "--epochs", "2", "--every", "1",
    "--train", "128", "--test", "32", "--measured", "16", "--probes", "1", "--iterations", "2", "--draws", "2",
]  # fmt: skip


class Stop(Exception):
    """Stands for whatever interrupts a run."""


def write_mnist(folder: Path) -> Path:
    """MNIST's four files, with 128 training and 32 test images."""
    for names, count in (((TRAIN_IMAGES, TRAIN_LABELS), 128), ((TEST_IMAGES, TEST_LABELS), 32)):
        for name, array in zip(names, digits(count), strict=True):
            write_idx(folder / name, array)
    return folder


def write_classes(folder: Path, part: str, of_each: int) -> dict[str, NDArray[np.uint8]]:
    """32x32 images, noise whose brightness tells the class, as PNG files; and what is in them."""
    rng = np.random.default_rng(of_each)
    written = {}
    for label, name in enumerate(_images.CIFAR_CLASSES):
        (folder / part / name).mkdir(parents=True)
        for i in range(of_each):
            pixels = rng.integers(0, 60, (32, 32, 3), np.uint8) + np.uint8(15 * label)
            Image.fromarray(pixels).save(folder / part / name / f"{i:04}.png")
            written[f"{name}/{i:04}"] = pixels
    return written


def assert_picture(path: Path, colors: int = 200) -> None:
    """A PNG of a slide's size with something in it: axes without content have below 150 colours, from their text."""
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) >= 600, pixels.shape
    packed = (255 * pixels).astype(int) @ [1 << 16, 1 << 8, 1]
    assert len(np.unique(packed)) > colors
