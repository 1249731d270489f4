"""What these scripts share with those of examples/pacgen: files, runs, command line, the look of the figures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common.errors import UsageError
from _common.figures import INK, MaxNLocator, band, figure, save, shades, styled
from _common.images import MOMENTS, shuffled_images
from _common.intervals import Interval, mean_interval
from _common.runs import Log, Run, common_flags, main, one_thread, perform, positive_int, read_json, seed_of, write_json

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
