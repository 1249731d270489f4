"""What these scripts share with those of examples/pacgen: files, command line, the look of the figures."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pacgen"))

from _figures import INK, figure, save, shades, styled
from _runs import common_flags, main, one_thread, positive_int, read_json, seed_of, write_json
from _tasks import UsageError

__all__ = [
    "INK",
    "UsageError",
    "common_flags",
    "figure",
    "main",
    "one_thread",
    "positive_int",
    "read_json",
    "save",
    "seed_of",
    "shades",
    "styled",
    "write_json",
]
