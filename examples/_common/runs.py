"""Runs that an interruption does not cost: their files, and the processes that make them.

A run is a name and its settings. What it gives is written to ``runs/<name>.json`` as soon as it is finished, and while
it is under way ``runs/<name>.pt`` holds the last epoch, so the same command goes on where it was stopped. Each run has
one thread, whatever ``--jobs``: sums of floats depend on the number of threads, results must not.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .errors import UsageError
from .files import in_one_step, jsonable, read_json, write_json
from .progress import bar


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


def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    found, wanted = jsonable(found), jsonable(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UsageError(
                f"{path}: made with {key} {found.get(key)}, but now it is {wanted.get(key)}; give another --out, "
                "or delete the folder"
            )


def _read_result(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or "settings" not in found:
        raise UsageError(f"{path}: not the result of a run; delete it, and the run is made again")
    return found


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
        result = _read_result(self.result_path)
        _check_settings(self.result_path, result["settings"], self.run.settings)
        return result

    def resume(self) -> dict[str, Any]:
        """The state given to the last :meth:`save`, with "epoch", the number of epochs behind: 0 for a new run."""
        if not self.checkpoint_path.is_file():
            return {"epoch": 0}
        try:
            found = torch.load(self.checkpoint_path, weights_only=True)
            settings, state = found["settings"], found["state"]
        except Exception as error:  # whatever a file of another kind makes of torch.load
            raise UsageError(
                f"{self.checkpoint_path}: not a checkpoint ({type(error).__name__}); delete it, and it starts again"
            ) from error
        _check_settings(self.checkpoint_path, settings, self.run.settings)
        self._tick(state["epoch"])
        return dict(state)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """:meth:`resume`, with model and optimizer put into the state that :meth:`keep` has kept."""
        state = self.resume()
        if state["epoch"]:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        return state

    def keep(self, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, **rest: Any) -> None:
        """:meth:`save` after ``epoch``: the model, the optimizer, and what else belongs to the state."""
        self.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **rest})

    def save(self, state: dict[str, Any]) -> None:
        """Keep ``state``, tensors and numbers, after an epoch; "epoch" counts those behind."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # killed without a word: nobody waits for this run
        with in_one_step(self.checkpoint_path) as partial:
            torch.save({"settings": self.run.settings, "state": state}, partial)
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
    with bar(total=total, initial=behind, desc=description, unit="epoch", smoothing=0.1) as shown:
        shown.set_postfix_str(f"{len(runs) - len(missing)}/{len(runs)} runs", refresh=False)
        if jobs == 1 or len(missing) <= 1:
            with one_thread():
                for run in missing:
                    _perform_one(folder, run, train, shown.update)
                    _count(shown, len(runs))
        else:
            _perform_in_processes(folder, missing, train, min(jobs, len(missing)), shown, len(runs))
    results = [Log(folder, run).result() for run in runs]
    return [result for result in results if result is not None]


def results_in(folder: Path) -> list[dict[str, Any]]:
    """What all finished runs in ``folder`` gave, by name."""
    results = [_read_result(path) for path in sorted((folder / "runs").glob("*.json"))]
    if not results:
        raise UsageError(f"--out {folder}: no finished runs; run without --plot-only")
    return results


def _count(shown: tqdm, runs: int) -> None:
    finished = 1 + int(shown.postfix.split("/")[0])
    shown.set_postfix_str(f"{finished}/{runs} runs", refresh=False)


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


def _perform_in_processes(folder: Path, runs: Sequence[Run], train: Train, jobs: int, shown: tqdm, of: int) -> None:
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
                shown.update(value)
            elif kind == "finished":
                finished += 1
                _count(shown, of)
            else:
                raise UsageError(value)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
