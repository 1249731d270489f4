"""The command line: flags that several scripts have, sizes of experiments, and how a script ends."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 1")
    return value


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 0")
    return value


def at_least_0(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} given, but it must be finite and at least 0")
    return value


def usable_device(text: str) -> str:
    """argparse type: the name of a device that this machine has, as it stands."""
    import torch  # here: scripts without training have no need of it

    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({str(error).splitlines()[0]})") from error
    return text


def common_flags(parser: argparse.ArgumentParser, out: str) -> None:
    """The flags of every experiment."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"results and figures ({out})")
    add("--seed", type=int, default=0, metavar="S", help="first seed (0)")
    add("--plot-only", action="store_true", help="draw the figures again from the JSON files in --out")


def training_flags(parser: argparse.ArgumentParser, full: str) -> None:
    """How networks are trained; ``full`` says what ``--full`` is."""
    add = parser.add_argument
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--jobs", type=positive_int, default=jobs, metavar="N", help=f"runs at a time, each on one thread ({jobs})")
    add("--device", type=usable_device, default="cpu", help="where to train (cpu)")
    add("--full", action="store_true", help=f"{full}; sizes that are given count all the same")


def mnist_flag(parser: argparse.ArgumentParser) -> None:
    """Where MNIST lies, as ``args.mnist``."""
    parser.add_argument(
        "--mnist", type=Path, metavar="FOLDER", help="folder with the four MNIST .gz files (downloaded to ./data)"
    )


def cifar10_flag(parser: argparse.ArgumentParser, *names: str) -> None:
    """Where CIFAR-10 lies, as ``args.cifar10``, whatever the flag is called."""
    parser.add_argument(
        *names,
        dest="cifar10",
        type=Path,
        metavar="PATH",
        help="CIFAR-10: archive or folder with train/<class>/ and test/<class>/, or torchvision's folder "
        "(downloaded to ./data)",
    )


def size_flags(parser: argparse.ArgumentParser, meanings: Mapping[str, str], *defaults: Any) -> None:
    """A flag for each of ``meanings``, without a default of its own: see :func:`size_of`.

    Args:
        meanings: flag without its dashes, and what it means; it sets the field of that name.
        defaults: NamedTuples of sizes, for the help; 0 is "all". More than one where tasks differ.
    """
    for name, meaning in meanings.items():
        values = [getattr(default, name.replace("-", "_")) for default in defaults]
        several = isinstance(values[0], tuple)
        real = isinstance(values[0][0] if several else values[0], float)
        texts = [" ".join(map(str, v)) if several else str(v or "all") for v in values]
        shown = " and ".join(dict.fromkeys(texts))
        parser.add_argument(
            f"--{name}",
            type=float if real else positive_int,
            nargs="+" if several else None,
            metavar="X" if real else "N",
            help=f"{meaning} ({shown})",
        )


def size_of(args: argparse.Namespace, default: Any, full: Any) -> Any:
    """``full`` where ``--full`` is given, else ``default``, with the fields that have flags of their own replaced."""
    given = {name: getattr(args, name, None) for name in default._fields}
    changes = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if v is not None}
    return (full if args.full else default)._replace(**changes)


def main(run: Callable[[], None]) -> None:
    """Run a script: errors of usage as one line, and an interruption with word of how to go on."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        run()
    except UsageError as error:
        sys.exit(f"error: {error}")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:  # --out is a file, or somebody else's
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
