"""How the benchmarks time their rows side by side, judge figures over several runs and describe the machine."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from peers import Step

SETTLE_SECONDS = 0.01  # an OpenMP thread without work spins for 5 to 7 ms before it sleeps (measured, GNU OpenMP)
BUSY_LOAD = 0.5  # runnable processes, mean of the last minute: above it the medians are not to be quoted


def milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def settled_milliseconds(step: Step) -> float:
    """After untimed runs. They wake the row's own OpenMP threads, which a backward keeps awake in training, and let
    those of the row before go to sleep: torch's OpenMP runtime is another than that of limits.c and torch.compile.
    """
    until = time.perf_counter() + SETTLE_SECONDS
    step()
    while time.perf_counter() < until:
        step()
    return milliseconds(step)


def interleaved(
    steps: dict[str, Step], rounds: int, label: str, timed: Callable[[Step], float]
) -> dict[str, list[float]]:
    """Times in ms by row, one per round, in an order that is shuffled: a row can gain or lose by the one before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in tqdm(range(rounds), desc=label, unit="round"):
            shuffled.shuffle(order)
            for name in order:
                times[name].append(timed(steps[name]))
    finally:
        gc.enable()
    return times


class Figure(NamedTuple):
    """What one run measured of something that must not exceed ``required``."""

    what: str
    measured: float
    required: float
    limit: float | None = None  # what the machine allows, as the same run measured it


def judged(runs: Sequence[Sequence[Figure]]) -> list[dict[str, Any]]:
    """Each figure over all runs: its median, and whether it is met, missed, missed by less than the runs differ, or
    beyond what the machine allows."""
    results = []
    for figures in zip(*runs, strict=True):
        measured, required = statistics.median(f.measured for f in figures), figures[0].required
        lowest, highest = min(f.measured for f in figures), max(f.measured for f in figures)
        verdict = "met" if measured <= required else "missed"
        if verdict == "missed" and measured - required < highest - lowest:
            verdict = "within the spread"
        limits = [f.limit for f in figures if f.limit is not None]
        limit = statistics.median(limits) if limits else None
        if verdict == "missed" and limit is not None and limit > required:
            verdict = "beyond the machine"
        results.append(
            {
                "what": figures[0].what,
                "measured": measured,
                "required": required,
                "lowest": lowest,
                "highest": highest,
                "limit": limit,
                "verdict": verdict,
                "met": verdict in ("met", "within the spread"),
            }
        )
    return results


def print_judged(targets: Sequence[dict[str, Any]], runs: int) -> None:
    for each in targets:
        spread = f"{each['lowest']:.2f} to {each['highest']:.2f} in {runs} runs" if runs > 1 else "one run: no spread"
        limit = "" if each["limit"] is None else f"the machine allows {each['limit']:.2f}; "
        asked = f"at most {each['required']:.2f}; {limit}{spread}"
        print(f"  {each['what']}: {each['measured']:.2f} ({asked}): {each['verdict']}")


def pooled(runs: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Times by row of all runs together; a row may be missing from some of them."""
    rows = dict.fromkeys(row for times in runs for row in times)
    return {row: [t for times in runs for t in times.get(row, [])] for row in rows}


def in_fresh_process(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Each run's memory lies elsewhere, and what torch.compile leaves behind is gone."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(measure, *args).result()


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(threads: int, rounds: int, runs: int) -> dict[str, Any]:
    has_peer = importlib.util.find_spec("pytorch_optimizer") is not None
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "rounds": rounds,
        "runs": runs,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pytorch_optimizer": importlib.metadata.version("pytorch-optimizer") if has_peer else None,
    }


def print_environment(environment: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if environment["load"] > BUSY_LOAD:
        print("note: this machine is busy (load); repeat on an idle one before quoting a number")
