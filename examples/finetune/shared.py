"""What fine-tuning shares with examples/pacgen: files, resuming, intervals, the look of the figures."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pacgen"))

from _figures import INK, MaxNLocator, figure, save, shades, styled
from _intervals import mean_interval
from _runs import Log, Run, main, one_thread, positive_int, read_json, seed_of, write_json
from _tasks import UsageError

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
