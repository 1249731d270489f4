"""What fine-tuning shares with examples/pacgen: files, resuming, intervals, the look of the figures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common.errors import UsageError
from _common.figures import INK, MaxNLocator, figure, save, shades, styled
from _common.intervals import mean_interval
from _common.runs import Log, Run, main, one_thread, positive_int, read_json, seed_of, write_json

__all__ = [
    "INK",
    "Log",
    "MaxNLocator",
    "Run",
    "UsageError",
    "figure",
    "main",
    "mean_interval",
    "one_thread",
    "positive_int",
    "read_json",
    "save",
    "seed_of",
    "shades",
    "styled",
    "write_json",
]
