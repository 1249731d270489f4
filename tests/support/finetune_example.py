"""What the tests of examples/finetune_efficientnet.py share: its modules on the path, and small images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_efficientnet.py"
sys.path.insert(0, str(SCRIPT.parent))  # as `python examples/finetune_efficientnet.py` does

CLASSES = ("blue", "green", "red")


def write_images(folder: Path, of_each: int, size: tuple[int, int] = (40, 36)) -> None:
    """Noise with more of one colour, as PNG files in a folder for each of three classes."""
    rng = np.random.default_rng(of_each)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(of_each):
            pixels = rng.integers(0, 160, (size[1], size[0], 3), np.uint8)
            pixels[..., 2 - channel] += 80
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


def write_parts(folder: Path) -> Path:
    """48 training and 24 test images."""
    write_images(folder / "train", 16)
    write_images(folder / "test", 8)
    return folder
