"""Where the MNIST example gets its images: a folder, ``./data``, torchvision's download, or scikit-learn's digits.

python examples/mnist_data.py      # says which it would be; exit status 3 if torchvision is missing to download
"""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import math
import queue
import socket
import struct
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = 0.1307, 0.3081  # of MNIST's training images, pixels scaled to [0, 1]
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # IDX: unsigned bytes (08) in three dimensions, in one
TRAIN_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")

#: Where MNIST may lie already: the four files themselves, or where torchvision puts them.
LOCAL = (Path("data"), Path("data/MNIST/raw"))
#: Servers that torchvision knows, and the seconds in which one must answer.
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
PATIENCE = 15.0
NEEDS_TORCHVISION = 3

Part = tuple[Tensor, Tensor]  #: images uint8 [N, 28, 28] and labels int64 [N]


class UsageError(Exception):
    """Something that the person at the command line can put right."""


class Data(NamedTuple):
    """What to train on, what to test on, and what it is called."""

    name: str
    train: Part
    test: Part


def say(text: str) -> None:
    """A line on standard output, at once."""
    print(f"Data: {text}", flush=True)


# ---- IDX files ----


def read_idx(path: Path, magic: int) -> Tensor:
    """The uint8 array of a gzipped IDX file: big-endian magic number, one size per dimension, then the bytes."""
    try:
        raw = bytearray(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        wanted = ", ".join(TRAIN_FILES + TEST_FILES)
        raise UsageError(f"{path}: no such file; --data wants a folder with {wanted}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read as a gzip file ({error}); download it again") from error
    header = 4 * (1 + magic % 256)
    found, *shape = struct.unpack(f">{header // 4}I", raw[:header].ljust(header, b"\0"))
    if found != magic:
        raise UsageError(f"{path}: magic number {found:#06x}, expected {magic:#06x}; is it the right file?")
    promised = header + math.prod(shape)
    if len(raw) != promised:
        size = f"{promised} bytes for {'x'.join(map(str, shape))} items"
        raise UsageError(f"{path}: {len(raw)} bytes unpacked, but its header promises {size}; download it again")
    if not shape[0]:
        raise UsageError(f"{path}: holds no items; download it again")
    return torch.frombuffer(raw, dtype=torch.uint8, offset=header).reshape(shape)


def read_folder(folder: Path, names: tuple[str, str]) -> Part:
    """Images uint8 [N, 28, 28] and labels int64 [N] from the two IDX files ``names``."""
    images = read_idx(folder / names[0], IMAGES_MAGIC)
    labels = read_idx(folder / names[1], LABELS_MAGIC).long()
    if images.shape[1:] != (28, 28):
        raise UsageError(f"{folder / names[0]}: images of {images.shape[1]}x{images.shape[2]}, expected 28x28")
    if len(labels) != len(images):
        raise UsageError(f"{folder / names[1]}: {len(labels)} labels for the {len(images)} images of {names[0]}")
    if labels.max() > 9:
        raise UsageError(f"{folder / names[1]}: label {labels.max()}, expected 0 to 9")
    return images, labels


def from_folder(folder: Path) -> Data:
    """MNIST from the four files in ``folder``."""
    return Data("MNIST", read_folder(folder, TRAIN_FILES), read_folder(folder, TEST_FILES))


def local_folder() -> Path | None:
    """The first of :data:`LOCAL` that has the four files."""
    return next((f for f in LOCAL if all((f / name).is_file() for name in TRAIN_FILES + TEST_FILES)), None)


# ---- torchvision ----


def answering_mirror() -> str | None:
    """The server that first sends the beginning of a gzip file, or None after :data:`PATIENCE` seconds.

    Threads ask, since nothing else bounds the look-up of a name: a network that drops packets can hold it for minutes.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(mirror: str) -> None:
        try:
            with urllib.request.urlopen(mirror + TEST_FILES[1], timeout=PATIENCE) as answer:
                answers.put(mirror if answer.read(2) == b"\x1f\x8b" else None)
        except (OSError, http.client.HTTPException):
            answers.put(None)

    for mirror in MIRRORS:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    end = time.monotonic() + PATIENCE
    for _ in MIRRORS:
        try:
            found = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return None
        if found is not None:
            return found
    return None


def download() -> Data:
    """MNIST from torchvision, downloaded to ``./data`` if it is not there yet; ``UsageError`` says why not."""
    ways_out = "give a folder that holds the four .gz files: --data FOLDER"
    try:
        from torchvision import datasets
    except ImportError as error:
        reason = f"torchvision, which downloads MNIST, cannot be imported ({error})"
        raise UsageError(f"{reason}; install it (pip install torchvision), or {ways_out}") from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        reason = f"this torchvision was built for another torch than {torch.__version__} ({error})"
        raise UsageError(f"{reason}; install both from one place, or {ways_out}") from error
    mirror = answering_mirror()
    if mirror is None:
        raise UsageError(f"no server that has MNIST answers within {PATIENCE:.0f} seconds; {ways_out}")
    mnist = type("MNIST", (datasets.MNIST,), {"mirrors": [mirror]})  # its name is a folder's, so it must stay
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # for a server that answers and then falls silent
    try:
        train, test = (mnist("./data", train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise UsageError(f"MNIST could not be downloaded ({' '.join(str(error).split())}); {ways_out}") from error
    finally:
        socket.setdefaulttimeout(before)
    return Data("MNIST", (train.data, train.targets), (test.data, test.targets))


# ---- scikit-learn ----


def digits() -> Data:
    """The 1,797 handwritten digits that come with scikit-learn (UCI), 8x8 pixels, enlarged to 28x28.

    They lie in the order in which people wrote them: the last 360, to test on, are mostly by other hands.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(f"the digits come with scikit-learn ({error}); pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)  # 0 to 16
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(small, size=(28, 28), mode="bilinear").round().to(torch.uint8).squeeze(1)
    targets = torch.from_numpy(labels).long()
    return Data("scikit-learn's digits", (images[:-360], targets[:-360]), (images[-360:], targets[-360:]))


# ---- which of them ----


def load(source: str | None) -> Data:
    """The data that ``--data`` names; without it MNIST from ``./data``, from torchvision, or else the digits.

    Says what is used and why. ``UsageError`` if what was named cannot be read.
    """
    if source is not None:
        return digits() if source == "digits" else from_folder(Path(source))
    reasons = []
    if folder := local_folder():
        try:
            found = from_folder(folder)
        except UsageError as error:  # half a download: torchvision knows the right checksums, and repairs it
            reasons.append(str(error))
        else:
            say(f"MNIST in {folder}")
            return found
    try:
        found = download()
    except UsageError as error:
        reasons.append(str(error))
    else:
        say("MNIST, by torchvision")
        return found
    try:
        found = digits()
    except UsageError as error:
        raise UsageError("; ".join([*reasons, str(error)])) from error
    for reason in reasons:
        say(reason)
    count = len(found.train[1]) + len(found.test[1])
    say(f"so this run takes the {count:,} handwritten digits of scikit-learn, 8x8 pixels enlarged to 28x28, not MNIST")
    return found


def main() -> int:
    """For ``make mnist``: whether torchvision has to be installed, which only a server that answers is worth."""
    if local_folder() or importlib.util.find_spec("torchvision"):
        return 0
    say(f"asking the servers that have MNIST, for {PATIENCE:.0f} seconds at most")
    mirror = answering_mirror()
    say(f"{mirror} answers" if mirror else "none answers, so torchvision is not installed for it")
    return NEEDS_TORCHVISION if mirror else 0


if __name__ == "__main__":
    sys.exit(main())
