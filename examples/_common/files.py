"""Files that are written whole or not at all, JSON, and the summary that an experiment leaves."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A path to write to, which then takes the place of ``path``: a script that is killed leaves the file before or
    the file after, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


def jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` in one step; NaN and infinity become null."""
    with in_one_step(path) as partial:
        partial.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value that :func:`write_json` wrote."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; run without --plot-only first") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON ({error}); delete it, and the run is made again") from error


def write_summary(out: Path, summary: Any, text: str) -> None:
    """Leave ``summary.json`` and ``summary.md``, and print the latter."""
    write_json(out / "summary.json", summary)
    (out / "summary.md").write_text(text)
    print(text)
