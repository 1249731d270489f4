"""How the benchmarks measure on a GPU: CUDA events, torch's memory statistics, the bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from flatmin.ops import _library
from peers import Builder, Step

DEVICE = torch.device("cuda", 0)
COPY, COPY_BYTES = "copy of 1 GiB by torch", 2**30
CYCLES_PER_MS = 3_000_000  # no GPU runs at more than 3 GHz


def unusable() -> str | None:
    """Why nothing can be measured here, if so."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    if "cuda" not in _library.DEVICES:
        return "flatmin has no CUDA kernels here: it was built without nvcc, or for a newer driver"
    return None


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def host_milliseconds(step: Step) -> float:
    """Until the host has launched everything. A row that waits for the device takes the device's time too."""
    torch.cuda.synchronize(DEVICE)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def host_medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    return {row: statistics.median(host_milliseconds(step) for _ in range(rounds)) for row, step in steps.items()}


def milliseconds(step: Step) -> float:
    """Time on the device of a step whose launches are in the queue before it starts, as behind a backward pass.

    The device is kept busy for twice as long as the host needs. Its queue holds about a thousand launches; a step of
    more is slowed down by the host from there on, as it is in training.
    """
    busy = int(2 * host_milliseconds(step) * CYCLES_PER_MS)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(DEVICE)
    torch.cuda._sleep(busy)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def extra_bytes(build: Builder, params: list[Tensor], averages: int, steps: int) -> int:
    """Peak of what a row asks for in so many steps, beyond its parameters and the base's averages of them. What it is
    given depends on the blocks that the rows before left in the cache: up to 1 MiB more for each."""
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
    step = build(params)
    for _ in range(steps):
        step()
    state = averages * sum(p.nbytes for p in params)
    peak: int = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"]
    return peak - before - state


def predicted_ms(nbytes: int, copy_ms: float) -> float:
    """Time to move so many bytes at the bandwidth of :func:`copy_step`."""
    return nbytes * copy_ms / (2 * COPY_BYTES)


def copy_step() -> dict[str, Step]:
    """The row that gives the device's bandwidth: what is read and written once each is out of any cache."""
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return {COPY: lambda: target.copy_(source)}
