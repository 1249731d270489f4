"""Bytes that a call allocates through torch on the CPU, counted one by one: no measuring of a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

__all__ = ["Allocated", "allocated"]


class Allocated(NamedTuple):
    """Beside what was there before: the peak, and what is left once the result is let go."""

    peak: int
    left: int


def allocated(call: Callable[[], Any]) -> Allocated:
    """Also what an operator takes and gives back while it runs, in this thread. The result counts for the peak."""
    call()  # what the first call loads stays
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded = enumerate(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]
    # only the private records hold every one: those of `profiler.events()` are summed up by operator
    moments = sorted((e.start_ns(), i, e.nbytes()) for i, e in recorded if e.name() == "[memory]")
    live = peak = 0
    for _, _, size in moments:
        live += size
        peak = max(peak, live)
    return Allocated(peak, live)
