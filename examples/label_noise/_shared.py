"""What these scripts share with those of examples/pacgen: files, runs, command line, the look of the figures."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pacgen"))

from _figures import INK, MaxNLocator, band, figure, save, shades, styled
from _intervals import Interval, mean_interval
from _runs import Log, Run, common_flags, main, one_thread, perform, positive_int, read_json, seed_of, write_json
from _tasks import MOMENTS, UsageError, shuffled_images

__all__ = [
    "INK",
    "MOMENTS",
    "Interval",
    "Log",
    "MaxNLocator",
    "Run",
    "UsageError",
    "band",
    "common_flags",
    "figure",
    "main",
    "mean_interval",
    "one_thread",
    "perform",
    "positive_int",
    "read_json",
    "save",
    "seed_of",
    "shades",
    "shuffled_images",
    "styled",
    "write_json",
]
