"""How the benchmarks time their rows side by side on a CPU, judge targets and describe the machine."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def target(
    what: str, measured: float, required: float, met: bool, goal: float | None = None, bound: float | None = None
) -> dict[str, Any]:
    """``bound``: what the least that the machine allows, measured in the same run, would reach in place of flatmin."""
    return {
        "what": what,
        "measured": measured,
        "required": required,
        "goal": goal or required,
        "met": met,
        "bound": bound,
    }


def print_targets(targets: list[dict[str, Any]]) -> None:
    for each in targets:
        verdict = "met" if each["met"] else "NOT met"
        bound = "" if each["bound"] is None else f", the machine allows {each['bound']:.2f}"
        print(f"  {each['what']}: {each['measured']:.2f} (required {each['required']:.2f}{bound}): {verdict}")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(threads: int, rounds: int) -> dict[str, Any]:
    has_peer = importlib.util.find_spec("pytorch_optimizer") is not None
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "rounds": rounds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pytorch_optimizer": importlib.metadata.version("pytorch-optimizer") if has_peer else None,
    }


def print_environment(environment: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if environment["load"] > BUSY_LOAD:
        print("note: this machine is busy (load); repeat on an idle one before quoting a number")
