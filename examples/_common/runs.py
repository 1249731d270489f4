"""What the scripts share: runs that an interruption does not cost, their JSON files, processes, the command line.

A run is a name and its settings. What it gives is written to ``runs/<name>.json`` as soon as it is finished, and while
it is under way ``runs/<name>.pt`` holds the last epoch, so the same command goes on where it was stopped. Whatever is
written replaces the old file in one step: a run that is killed leaves the file before or the file after, never half.
Each run has one thread, whatever ``--jobs``: sums of floats depend on the number of threads, results must not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .errors import UsageError


class Run(NamedTuple):
    """One training run. ``settings`` are JSON values and say all that its numbers depend on."""

    name: str
    settings: dict[str, Any]

    @property
    def epochs(self) -> int:
        return self.settings["epochs"]


def seed_of(*parts: Any) -> int:
    """A seed that depends on all ``parts``, so that every epoch of every run has random numbers of its own."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


# ---- files ----


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` in one step; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_jsonable(value), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """The value that :func:`write_json` wrote."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; run without --plot-only first") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON ({error}); delete it, and the run is made again") from error


def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, wanted = _jsonable(found), _jsonable(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UsageError(
                f"{path}: made with {key} {found.get(key)}, but now it is {wanted.get(key)}; give another --out, "
                "or delete the folder"
            )


class Log:
    """Where a run is kept while it is under way, and afterwards.

    Args:
        folder: the script's ``--out``.
        run: the run.
        tick: called with the number of epochs that are behind since the last call.
    """

    def __init__(self, folder: Path, run: Run, tick: Callable[[int], None] = lambda epochs: None) -> None:
        self.run, self._tick = run, tick
        self.result_path = folder / "runs" / f"{run.name}.json"
        self.checkpoint_path = self.result_path.with_suffix(".pt")

    def result(self) -> dict[str, Any] | None:
        """What a finished run gave; None while it is not."""
        if not self.result_path.is_file():
            return None
        result: dict[str, Any] = read_json(self.result_path)
        _check_settings(self.result_path, result["settings"], self.run.settings)
        return result

    def resume(self) -> dict[str, Any]:
        """The state given to the last :meth:`save`, with "epoch", the number of epochs behind: 0 for a new run."""
        if not self.checkpoint_path.is_file():
            return {"epoch": 0}
        found = torch.load(self.checkpoint_path, weights_only=True)
        _check_settings(self.checkpoint_path, found["settings"], self.run.settings)
        self._tick(found["state"]["epoch"])
        return dict(found["state"])

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state``, tensors and numbers, after an epoch; "epoch" counts those behind."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # killed without a word: nobody waits for this run
        self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint_path.with_suffix(".pt.partial")
        torch.save({"settings": self.run.settings, "state": state}, partial)
        partial.replace(self.checkpoint_path)
        self._tick(1)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, and forget the state."""
        write_json(self.result_path, {"settings": self.run.settings, **result})
        self.checkpoint_path.unlink(missing_ok=True)


# ---- processes ----

#: Trains a run: resumes from the log, saves every epoch there, and returns what belongs in the JSON.
Train = Callable[[Run, Log], dict[str, Any]]


def perform(folder: Path, runs: Sequence[Run], train: Train, jobs: int, description: str) -> list[dict[str, Any]]:
    """The results of all runs, those made that are not there yet: ``jobs`` at once, with one progress bar."""
    missing = [run for run in runs if Log(folder, run).result() is None]
    total, behind = sum(run.epochs for run in runs), sum(run.epochs for run in runs if run not in missing)
    every = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, initial=behind, desc=description, unit="epoch", mininterval=every, smoothing=0.1) as bar:
        bar.set_postfix_str(f"{len(runs) - len(missing)}/{len(runs)} runs", refresh=False)
        if jobs == 1 or len(missing) <= 1:
            with one_thread():
                for run in missing:
                    _perform_one(folder, run, train, bar.update)
                    _count(bar, len(runs))
        else:
            _perform_in_processes(folder, missing, train, min(jobs, len(missing)), bar, len(runs))
    results = [Log(folder, run).result() for run in runs]
    return [result for result in results if result is not None]


def _count(bar: tqdm, runs: int) -> None:
    finished = 1 + int(bar.postfix.split("/")[0])
    bar.set_postfix_str(f"{finished}/{runs} runs", refresh=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _perform_one(folder: Path, run: Run, train: Train, tick: Callable[[int], None]) -> None:
    log = Log(folder, run, tick)
    log.finish(train(run, log))


def _work(folder: Path, train: Train, runs: Any, reports: Any) -> None:
    """A process: takes runs until there is none, and reports epochs, finished runs and errors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for run in iter(runs.get, None):
        try:
            _perform_one(folder, run, train, lambda epochs: reports.put(("epochs", epochs)))
            reports.put(("finished", run.name))
        except Exception as error:  # noqa: PERF203 - a run takes minutes
            text = str(error) if isinstance(error, UsageError) else f"{run.name}:\n{traceback.format_exc()}"
            reports.put(("failed", text))
            return


def _perform_in_processes(folder: Path, runs: Sequence[Run], train: Train, jobs: int, bar: tqdm, of: int) -> None:
    context = multiprocessing.get_context("spawn")  # fork and a library with threads do not go together
    waiting, reports = context.Queue(), context.Queue()
    for run in [*runs, *[None] * jobs]:
        waiting.put(run)
    workers = [context.Process(target=_work, args=(folder, train, waiting, reports), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        finished = 0
        while finished < len(runs):
            try:
                kind, value = reports.get(timeout=1.0)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    codes = [worker.exitcode for worker in workers]
                    raise UsageError(f"all processes ended (exit codes {codes}); is there enough memory?") from None
                continue
            if kind == "epochs":
                bar.update(value)
            elif kind == "finished":
                finished += 1
                _count(bar, of)
            else:
                raise UsageError(value)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


# ---- command line ----


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 1")
    return value


def common_flags(parser: argparse.ArgumentParser, out: str) -> None:
    """The flags that every script has."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help=f"results and figures ({out})")
    add("--seed", type=int, default=0, metavar="S", help="first seed (0)")
    add("--plot-only", action="store_true", help="draw the figures again from the JSON files in --out")


def training_flags(parser: argparse.ArgumentParser, full: str | None) -> None:
    """The flags of the scripts that train networks; ``full`` says what ``--full`` trains, None leaves it out."""
    add = parser.add_argument
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--jobs", type=positive_int, default=jobs, metavar="N", help=f"runs at a time, each on one thread ({jobs})")
    add("--mnist", type=Path, metavar="FOLDER", help="folder with the four MNIST .gz files (downloaded to ./data)")
    add(
        "--cifar10",
        type=Path,
        metavar="PATH",
        help="archive or folder with train/<class>/ and test/<class>/, or torchvision's folder (downloaded to ./data)",
    )
    add("--device", default="cpu", help="where to train (cpu)")
    if full is not None:
        add("--full", action="store_true", help=f"{full}, instead of the size of an hour on two cores")


def main(run: Callable[[], None]) -> None:
    """Run a script: errors of usage as one line, and an interruption with word of how to go on."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        run()
    except UsageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
