"""The time and memory of one SAM step: flatmin beside its peers and beside what the machine allows.

    python benchmarks/sam_step.py                                        # every shape set
    python benchmarks/sam_step.py --shapes resnet50 --rounds 50 --json resnet50.json
    python benchmarks/sam_step.py --quick                                # seconds: does it run?
    python benchmarks/sam_step.py --device cuda                          # on the first GPU

One step is the norm of the gradients, the perturbation, the restore and SGD with momentum 0.9; the same gradients stand
in for those of the second backward. Before anything is timed, the rows must agree on the weights after two steps. Every
round times each row once, in shuffled order, so that a slow second hits all rows; the table gives medians over rounds.
Use an idle machine: a core that is busy elsewhere delays every barrier, up to a time slice of the scheduler (4 ms), and
the rows with several barriers per tensor slow down tenfold where flatmin, with three per step, hardly does.

How to read the table: ``ratio`` is a row's time over that of the first row, ``flatmin.SAM``. ``GB/s`` is what a step
has to move (10 streams of 4 bytes per parameter) over its time, whatever the row really moved. ``extra`` is the peak of
what torch allocated beyond parameters, gradients and momentum, in copies of the parameters; SAM needs one. The
``limit`` rows move the 10 streams over flat arrays in C (limits.c); the faster of the two is the machine's limit, and
``read`` and ``copy`` give the bandwidth of 1 and 2 streams. ``calls alone`` is a step of as many one-element tensors,
each half of it right after a step of the real tensors, whose streams leave nothing of torch's objects in the cache:
what Python and the dispatcher take. Beside a target stands what the machine allows: the limit and such calls in place
of flatmin. Rows whose package is not installed are left out, and so are the limits without a C compiler (``CC``, else
``cc``).

Each shape set has a process of its own, and its tensors are made before anything is compiled: what torch.compile leaves
of the heap is so scattered that the calls of a step over tensors made later take 1.7 times as long.

On a GPU a row's time is that of the device, by CUDA events, with all launches in the queue beforehand; ``host`` is how
long the host takes to launch a step. The limit is the bandwidth of a copy of 1 GiB, and docs/traffic.md derives what
each row has to move.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cuda_timing
from peers import (
    CALLS,
    COMPILED,
    COPIES,
    FLATMIN,
    LIMITS,
    PEERS,
    READ,
    TEXTBOOK,
    Builder,
    Step,
    builders,
    compile_limits,
    flatmin_halves,
    limit_steps,
)
from shapes import SHAPE_SETS, Shape
from timing import (
    environment,
    interleaved,
    milliseconds,
    print_environment,
    print_targets,
    settled_milliseconds,
    target,
)

STREAMS, ITEMSIZE = 10, 4
WARM_UP_STEPS = 2  # the first makes the momentum buffers, the second runs as all later ones do

# Shape set -> the rows that flatmin is held against -> (times as fast as the fastest of them, at least; goal).
SPEED_TARGETS: dict[str, list[tuple[Sequence[str], float, float]]] = {
    "efficientnet_b0": [((TEXTBOOK,), 4.5, 5.0), (tuple(PEERS), 3.3, 3.5), ((COMPILED,), 5.0, 5.0)],
    "resnet50": [((TEXTBOOK,), 4.8, 5.0), (tuple(PEERS), 3.3, 3.5), ((COMPILED,), 3.0, 3.0)],
    "matrices": [((TEXTBOOK,), 6.0, 7.0), (tuple(PEERS), 4.3, 4.7), ((COMPILED,), 4.5, 4.5)],
}
LIMIT_TARGETS = {"efficientnet_b0": 1.25, "resnet50": 1.15, "matrices": 1.10}  # at most this many times the limit
OVERHEAD_TARGET_MS = 0.4
EXTRA_COPIES_TARGET = 1.05  # one copy; the rest is alignment and scalars


# ---- measuring ----


def parameters(shapes: Sequence[Shape], grads: Sequence[Tensor]) -> list[Tensor]:
    """Parameters with the same values on every call. All rows read one set of gradients, none writes them."""
    generator, device = torch.Generator().manual_seed(0), grads[0].device
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def check_agreement(weights: dict[str, list[Tensor]]) -> None:
    """RuntimeError unless every row has the textbook's weights: only equal work is compared."""
    for name, params in weights.items():
        for p, expected in zip(params, weights[TEXTBOOK], strict=True):
            if not torch.allclose(p, expected, rtol=1e-5, atol=1e-6):
                raise RuntimeError(f"{name} and {TEXTBOOK} disagree on the weights of shape {tuple(p.shape)}")


def _allocations(trace: Path) -> Iterator[tuple[int, int]]:
    """(size, total after it) of each allocation (size > 0) and release in a profiler's trace, in order of time."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        yield event["args"]["Bytes"], event["args"]["Total Allocated"]


def extra_bytes(build: Builder, shapes: Sequence[Shape], grads: Sequence[Tensor], folder: Path) -> int:
    """Peak of what a row allocates in two steps, beyond its parameters and their momentum."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build(parameters(shapes, grads))
        for _ in range(WARM_UP_STEPS):
            step()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    allocations = list(_allocations(trace))
    size, total = allocations[0]
    peak = max(after for _, after in allocations) - (total - size)
    return peak - 2 * sum(g.nbytes for g in grads)


class Machine(NamedTuple):
    """What differs between a CPU and a GPU."""

    device: torch.device
    timed: Callable[[Step], float]  # ms
    extra_bytes: Callable[[Builder, Sequence[Shape], Sequence[Tensor]], int]
    limits: Callable[[int], dict[str, Step]]  # rows that show the machine's bandwidth, for so many elements

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def cpu(library: ctypes.CDLL | None, folder: Path) -> Machine:
    def extra(build: Builder, shapes: Sequence[Shape], grads: Sequence[Tensor]) -> int:
        return extra_bytes(build, shapes, grads, folder)

    def limits(elements: int) -> dict[str, Step]:
        return limit_steps(library, elements, torch.get_num_threads()) if library is not None else {}

    return Machine(torch.device("cpu"), settled_milliseconds, extra, limits)


def first_gpu() -> Machine:
    def extra(build: Builder, shapes: Sequence[Shape], grads: Sequence[Tensor]) -> int:
        return cuda_timing.extra_bytes(build, parameters(shapes, grads), WARM_UP_STEPS)

    return Machine(cuda_timing.DEVICE, cuda_timing.milliseconds, extra, lambda _: cuda_timing.copy_step())


def calls_alone(halves: Sequence[Step], before: Step, rounds: int) -> list[float]:
    """Times in ms of a step in halves, each right after the step ``before``."""
    times = []
    for _ in range(WARM_UP_STEPS + rounds):
        spent = 0.0
        for half in halves:
            settled_milliseconds(before)
            spent += milliseconds(half)
        times.append(spent)
    return times[WARM_UP_STEPS:]


def measure(name: str, rounds: int, with_compile: bool, machine: Machine) -> dict[str, Any]:
    """Everything about one shape set, as it goes into the JSON."""
    shapes = SHAPE_SETS[name]()
    elements = sum(math.prod(shape) for shape in shapes)
    generator = torch.Generator().manual_seed(1)
    grads = [(1e-2 * torch.randn(shape, generator=generator)).to(machine.device) for shape in shapes]
    rows = builders(with_compile, with_foreach=machine.is_gpu)
    weights = {row: parameters(shapes, grads) for row in rows}
    steps = {row: build(weights[row]) for row, build in rows.items()}
    small = flatmin_halves(parameters([(1,)] * len(shapes), [torch.ones(1) for _ in shapes]))
    warm_up = {row: sum(milliseconds(step) for _ in range(WARM_UP_STEPS)) for row, step in steps.items()}
    check_agreement(weights)
    if moves_data(name):
        steps |= machine.limits(elements)
    times = interleaved(steps, rounds, name, machine.timed)
    if moves_data(name) and not machine.is_gpu:
        times[CALLS] = calls_alone(small, steps[FLATMIN], rounds)
    host = cuda_timing.host_medians(steps, rounds) if machine.is_gpu else {}
    del steps, weights
    extra = {row: machine.extra_bytes(build, shapes, grads) / (ITEMSIZE * elements) for row, build in rows.items()}
    return {
        "tensors": len(shapes),
        "parameters": elements,
        "compile_seconds": warm_up[COMPILED] / 1e3 if COMPILED in rows else None,
        "rows": {row: _summary(row, times, elements, extra.get(row), host.get(row)) for row in times},
        "targets": [] if machine.is_gpu else list(_targets(name, times, extra)),
    }


def moves_data(name: str) -> bool:
    """``overhead`` is about calls alone: no bandwidth to reach, no loops to fuse."""
    return name != "overhead"


def _moved_bytes(row: str, elements: int) -> int:
    if row == cuda_timing.COPY:
        return 2 * cuda_timing.COPY_BYTES
    if row == CALLS:
        return 0
    return (1 if row == READ else 2 if row in COPIES else STREAMS) * ITEMSIZE * elements


def _summary(
    row: str, times: dict[str, list[float]], elements: int, extra: float | None, host: float | None
) -> dict[str, Any]:
    median = statistics.median(times[row])
    quartiles = statistics.quantiles(times[row], n=4, method="inclusive") if len(times[row]) > 1 else [median] * 3
    return {
        "median_ms": median,
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "ratio": median / statistics.median(times[FLATMIN]),
        "gb_per_s": _moved_bytes(row, elements) / median / 1e6,
        "extra_copies": extra,
        "host_ms": host,
    }


# ---- targets and output ----


def _targets(name: str, times: dict[str, list[float]], extra: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What the project set itself on a CPU, for the rows that ran."""
    median = {row: statistics.median(t) for row, t in times.items()}
    limit = min((median[row] for row in LIMITS if row in median), default=None)
    least = limit + median[CALLS] if limit else None
    for rivals, required, goal in SPEED_TARGETS.get(name, []):
        present = [row for row in rivals if row in median]
        if present:
            best = min(present, key=median.__getitem__)
            speed = median[best] / median[FLATMIN]
            bound = median[best] / least if least else None
            yield target(f"times as fast as {best}", speed, required, speed >= required, goal, bound)
    if limit and name in LIMIT_TARGETS:
        over, required = median[FLATMIN] / limit, LIMIT_TARGETS[name]
        yield target("time over the limit", over, required, over <= required, bound=least / limit)
    if name == "overhead":
        spent = median[FLATMIN]
        yield target("ms for a step of 1-element tensors", spent, OVERHEAD_TARGET_MS, spent <= OVERHEAD_TARGET_MS)
        python = spent - median["flatmin.ops"]
        yield target("ms of it outside the operators", python, OVERHEAD_TARGET_MS, python <= OVERHEAD_TARGET_MS)
    else:
        copies = extra[FLATMIN]
        yield target("extra copies of the parameters", copies, EXTRA_COPIES_TARGET, copies <= EXTRA_COPIES_TARGET)


def print_report(name: str, result: dict[str, Any]) -> None:
    on_gpu = result["rows"][FLATMIN]["host_ms"] is not None
    print(f"\n{name}: {result['tensors']} tensors, {result['parameters']:,} parameters")
    print(f"  {'row':34} {'ms':>9} {'ratio':>7} {'GB/s':>7} {'extra':>7} {'host' if on_gpu else '':>7}".rstrip())
    for row, values in result["rows"].items():
        extra = "" if values["extra_copies"] is None else f"{values['extra_copies']:.2f}"
        host = "" if values["host_ms"] is None else f"{values['host_ms']:.3f}"
        numbers = f"{values['median_ms']:9.3f} {values['ratio']:7.2f} {values['gb_per_s']:7.1f}"
        print(f"  {row:34} {numbers} {extra:>7} {host:>7}".rstrip())
    if cuda_timing.COPY in result["rows"]:
        share = result["rows"][FLATMIN]["gb_per_s"] / result["rows"][cuda_timing.COPY]["gb_per_s"]
        print(f"  {FLATMIN} moves its {STREAMS} streams at {share:.0%} of the bandwidth of a copy")
    if result["compile_seconds"] is not None:
        print(f"  torch.compile took {result['compile_seconds']:.0f} s, not in its row")
    print_targets(result["targets"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one SAM step of flatmin and of its peers, side by side.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPE_SETS), default=list(SHAPE_SETS), metavar="SET")
    parser.add_argument("--rounds", type=int, default=30, help="steps per row, at least 1 (default 30)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="MNIST only, 3 rounds, no torch.compile")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rounds, args.no_compile = ["mnist"], 3, True
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.device == "cuda" and (reason := cuda_timing.unusable()):
        parser.error(f"--device cuda: {reason}")
    return args


def measure_on(name: str, device: str, threads: int, rounds: int, with_compile: bool) -> dict[str, Any]:
    """:func:`measure` on a device with so many threads, in this process."""
    torch.set_num_threads(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise prints two lines on stderr for every row
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # a kept cache would hide the time to compile
        machine = first_gpu() if device == "cuda" else cpu(compile_limits(Path(folder)), Path(folder))
        return measure(name, rounds, with_compile and moves_data(name), machine)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    report: dict[str, Any] = {"environment": environment(args.threads, args.rounds), "shapes": {}}
    if args.device == "cuda":
        report["environment"] |= cuda_timing.environment()
    print_environment(report["environment"])
    for name in args.shapes:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            done = fresh.submit(measure_on, name, args.device, args.threads, args.rounds, not args.no_compile)
        report["shapes"][name] = done.result()
        print_report(name, report["shapes"][name])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
