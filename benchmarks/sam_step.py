"""The time and memory of one SAM step: flatmin beside its peers and beside what the machine allows.

    python benchmarks/sam_step.py                                        # every shape set, three runs
    python benchmarks/sam_step.py --shapes resnet50 --rounds 50 --json resnet50.json
    python benchmarks/sam_step.py --base adamw                           # instead of SGD with momentum
    python benchmarks/sam_step.py --quick                                # seconds: does it run?
    python benchmarks/sam_step.py --device cuda                          # on the first GPU

One step is the norm of the gradients, the perturbation, the restore and SGD with momentum 0.9; the same gradients stand
in for those of the second backward. Before anything is timed, the rows must agree on the weights after two steps. Every
round times each row once, in shuffled order, so that a slow second hits all rows; the table gives medians over rounds.
Use an idle machine: a core that is busy elsewhere delays every barrier, up to a time slice of the scheduler (4 ms), and
the rows with several barriers per tensor slow down tenfold where flatmin, with three per step, hardly does.

How to read the table: ``ratio`` is a row's time over that of the first row, ``flatmin.SAM``. ``GB/s`` is what a step
has to move (10 streams of 4 bytes per parameter, 12 with Adam) over its time, whatever the row really moved. ``extra``
is the peak of what torch allocated beyond parameters, gradients and the base's averages, in copies of the parameters;
SAM needs one. The ``limit`` rows move 10 streams over flat arrays in C (limits.c); the faster of the two is the
machine's limit, 12 tenths of it with Adam, and ``read`` and ``copy`` give the bandwidth of 1 and 2 streams. ``calls
alone`` is a step of as many one-element tensors, each part of it right after a step of the real tensors, whose streams
leave nothing of torch's objects in the cache: what Python and the dispatcher take. Rows whose package is not installed
are left out, and so are the limits without a C compiler (``CC``, else ``cc``).

What is asked of flatmin is what a kernel can give on any machine: at most 1.1 times the limit and the calls together,
0.4 ms for a step of 213 one-element tensors, and after the context, which moves two streams more and makes a call
more, at most 1.25 times the time of the closure path, 1.2 with Adam; beside it stands what the streams and the calls
alone would make of that. How far peers are from the limit differs from machine to machine, so their ratios are reported
and nothing is asked of them. Everything is measured in three runs (``--runs``): the table has the medians over all
rounds, and a figure that misses by less than the three runs differ is not called missed.

Each shape set of each run has a process of its own, and its tensors are made before anything is compiled: what
torch.compile leaves of the heap is so scattered that the calls of a step over tensors made later take 1.7 times as
long. The first run alone has the compiled row.

On a GPU a row's time is that of the device, by CUDA events, with all launches in the queue beforehand; ``host`` is how
long the host takes to launch a step. The limit is the bandwidth of a copy of 1 GiB, ``calls alone`` is what the device
takes for a step of as many one-element tensors, and ``model`` is the time of the streams that docs/traffic.md counts
for a row, at that bandwidth.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cuda_timing
from peers import (
    BASES,
    CALLS,
    COMPILED,
    CONTEXT,
    CONTEXT_CALLS,
    COPIES,
    FLATMIN,
    LIMITS,
    READ,
    STREAMS,
    TEXTBOOK,
    Base,
    Builder,
    Step,
    builders,
    compile_limits,
    context_parts,
    flatmin_parts,
    in_turn,
    limit_steps,
)
from shapes import SHAPE_SETS, Shape
from timing import (
    Figure,
    environment,
    in_fresh_process,
    interleaved,
    judged,
    milliseconds,
    pooled,
    print_environment,
    print_judged,
    settled_milliseconds,
)

ITEMSIZE = 4
WARM_UP_STEPS = 2  # the first makes the base's averages, the second runs as all later ones do

LIMIT_REQUIRED = 1.10  # times the limit and the calls
OVERHEAD_REQUIRED_MS = 0.4
EXTRA_COPIES_REQUIRED = 1.05  # one copy; the rest is alignment and scalars


#: The rows of a step over as many tensors of one element, and of which row they are the calls.
PARTS = {CALLS: flatmin_parts, CONTEXT_CALLS: context_parts}
CALLS_OF = {FLATMIN: CALLS, CONTEXT: CONTEXT_CALLS}


# ---- measuring ----


def random_tensors(shapes: Sequence[Shape], seed: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def parameters(values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Parameters with these values. All rows read one set of gradients, none writes them."""
    params = [v.clone().requires_grad_() for v in values]
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


def extra_bytes(build: Builder, values: Sequence[Tensor], grads: Sequence[Tensor], averages: int, folder: Path) -> int:
    """Peak of what a row allocates in two steps, beyond its parameters and the base's averages of them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build(parameters(values, grads))
        for _ in range(WARM_UP_STEPS):
            step()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    allocations = list(_allocations(trace))
    size, total = allocations[0]
    peak = max(after for _, after in allocations) - (total - size)
    return peak - (1 + averages) * sum(g.nbytes for g in grads)


class Machine(NamedTuple):
    """What differs between a CPU and a GPU."""

    device: torch.device
    timed: Callable[[Step], float]  # ms
    extra_bytes: Callable[[Builder, Sequence[Tensor], Sequence[Tensor], int], int]
    limits: Callable[[int], dict[str, Step]]  # rows that show the machine's bandwidth, for so many elements

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def cpu(library: ctypes.CDLL | None, folder: Path) -> Machine:
    def extra(build: Builder, values: Sequence[Tensor], grads: Sequence[Tensor], averages: int) -> int:
        return extra_bytes(build, values, grads, averages, folder)

    def limits(elements: int) -> dict[str, Step]:
        return limit_steps(library, elements, torch.get_num_threads()) if library is not None else {}

    return Machine(torch.device("cpu"), settled_milliseconds, extra, limits)


def first_gpu() -> Machine:
    def extra(build: Builder, values: Sequence[Tensor], grads: Sequence[Tensor], averages: int) -> int:
        return cuda_timing.extra_bytes(build, parameters(values, grads), averages, WARM_UP_STEPS)

    return Machine(cuda_timing.DEVICE, cuda_timing.milliseconds, extra, lambda _: cuda_timing.copy_step())


def calls_alone(parts: Sequence[Step], before: Step, rounds: int) -> list[float]:
    """Times in ms of a step in parts, each right after the step ``before``."""
    times = []
    for _ in range(WARM_UP_STEPS + rounds):
        spent = 0.0
        for part in parts:
            settled_milliseconds(before)
            spent += milliseconds(part)
        times.append(spent)
    return times[WARM_UP_STEPS:]


def measure(name: str, base: Base, rounds: int, with_compile: bool, machine: Machine) -> dict[str, Any]:
    """One run over one shape set: times of each row in ms, the memory they take, and how long the host launches."""
    shapes = SHAPE_SETS[name]()
    elements = sum(math.prod(shape) for shape in shapes)
    values = random_tensors(shapes, 0, machine.device)
    grads = [g.mul_(1e-2) for g in random_tensors(shapes, 1, machine.device)]
    ones = [torch.ones(1, device=machine.device) for _ in shapes]
    rows = builders(base, with_compile, with_foreach=machine.is_gpu)
    weights = {row: parameters(values, grads) for row in rows}
    steps = {row: build(weights[row]) for row, build in rows.items()}
    small = {row: parts(parameters(ones, ones), base) for row, parts in PARTS.items()}
    warm_up = {row: sum(milliseconds(step) for _ in range(WARM_UP_STEPS)) for row, step in steps.items()}
    check_agreement(weights)
    if moves_data(name):
        steps |= machine.limits(elements)
        if machine.is_gpu:
            steps |= {row: in_turn(parts, base)(parameters(ones, ones)) for row, parts in PARTS.items()}
    times = interleaved(steps, rounds, name, machine.timed)
    if moves_data(name) and not machine.is_gpu:
        times |= {row: calls_alone(parts, steps[FLATMIN], rounds) for row, parts in small.items()}
    host = cuda_timing.host_medians(steps, rounds) if machine.is_gpu else {}
    del steps, weights
    nbytes, averages = ITEMSIZE * elements, base.averages
    return {
        "tensors": len(shapes),
        "parameters": elements,
        "compile_seconds": warm_up[COMPILED] / 1e3 if COMPILED in rows else None,
        "times": times,
        "extra": {row: machine.extra_bytes(build, values, grads, averages) / nbytes for row, build in rows.items()},
        "host": host,
    }


def moves_data(name: str) -> bool:
    """``overhead`` is about calls alone: no bandwidth to reach, no loops to fuse."""
    return name != "overhead"


# ---- figures and output ----


def _moved_bytes(row: str, base: Base, elements: int) -> int:
    """What a step has to move, whatever the row does."""
    if row == cuda_timing.COPY:
        return 2 * cuda_timing.COPY_BYTES
    if row in PARTS:
        return 0
    streams = 1 if row == READ else 2 if row in COPIES else STREAMS[FLATMIN] if row in LIMITS else base.streams[FLATMIN]
    return streams * ITEMSIZE * elements


def _stream_ms(median: dict[str, float], elements: int) -> float | None:
    """The least time in which this machine moves a stream of a step, if that was measured."""
    if cuda_timing.COPY in median:
        return cuda_timing.predicted_ms(ITEMSIZE * elements, median[cuda_timing.COPY])
    limit = min((median[row] for row in LIMITS if row in median), default=None)
    return limit and limit / STREAMS[FLATMIN]


def figures(name: str, base: Base, run: dict[str, Any]) -> list[Figure]:
    """What is asked of flatmin, as far as this run measured it."""
    median = {row: statistics.median(times) for row, times in run["times"].items()}
    stream = _stream_ms(median, run["parameters"]) if moves_data(name) else None
    least = {}  # ms of the streams and the calls
    if stream is not None:
        least = {row: base.streams[row] * stream + median[CALLS_OF[row]] for row in CALLS_OF}
    allowed = least[CONTEXT] / least[FLATMIN] if least else None
    after = Figure(
        "after the context, times the closure path", median[CONTEXT] / median[FLATMIN], base.context_required, allowed
    )
    if not moves_data(name):
        spent = run["host"].get(FLATMIN, median[FLATMIN])
        return [Figure(f"ms for a step of {run['tensors']} one-element tensors", spent, OVERHEAD_REQUIRED_MS), after]
    found = [after, Figure("extra copies of the parameters", run["extra"][FLATMIN], EXTRA_COPIES_REQUIRED)]
    if least:
        over = median[FLATMIN] / least[FLATMIN]
        found.insert(0, Figure("time over the limit and the calls", over, LIMIT_REQUIRED))
    return found


def combined(name: str, base: Base, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything about one shape set, as it goes into the JSON; the first run is the one that compiled."""
    times = pooled([run["times"] for run in runs])
    median = {row: statistics.median(values) for row, values in times.items()}
    elements, extra, copy = runs[0]["parameters"], runs[0]["extra"], median.get(cuda_timing.COPY)
    rows = {}
    for row, values in times.items():
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        hosts = [run["host"][row] for run in runs if row in run["host"]]
        by_model = copy is not None and row in base.streams
        rows[row] = {
            "median_ms": median[row],
            "quartiles_ms": [quartiles[0], quartiles[2]],
            "ratio": median[row] / median[FLATMIN],
            "gb_per_s": _moved_bytes(row, base, elements) / median[row] / 1e6,
            "extra_copies": extra.get(row),
            "host_ms": statistics.median(hosts) if hosts else None,
            "model_ms": cuda_timing.predicted_ms(base.streams[row] * ITEMSIZE * elements, copy) if by_model else None,
        }
    return {
        "runs": len(runs),
        "tensors": runs[0]["tensors"],
        "parameters": elements,
        "compile_seconds": runs[0]["compile_seconds"],
        "rows": rows,
        "targets": judged([figures(name, base, run) for run in runs]),
    }


def print_report(name: str, base: Base, result: dict[str, Any]) -> None:
    on_gpu = result["rows"][FLATMIN]["host_ms"] is not None
    columns = f"  {'row':47} {'ms':>9} {'ratio':>7} {'GB/s':>7} {'extra':>7}" + f" {'host':>7} {'model':>7}" * on_gpu
    print(f"\n{name}: {result['tensors']} tensors, {result['parameters']:,} parameters")
    print(columns)
    for row, values in result["rows"].items():
        numbers = f"{values['median_ms']:9.3f} {values['ratio']:7.2f} {values['gb_per_s']:7.1f}"
        extra = "" if values["extra_copies"] is None else f"{values['extra_copies']:.2f}"
        host, model = ("" if values[key] is None else f"{values[key]:.3f}" for key in ("host_ms", "model_ms"))
        print(f"  {row:47} {numbers} {extra:>7} {host:>7} {model:>7}".rstrip())
    if cuda_timing.COPY in result["rows"]:
        share = result["rows"][FLATMIN]["gb_per_s"] / result["rows"][cuda_timing.COPY]["gb_per_s"]
        print(f"  {FLATMIN} moves its {base.streams[FLATMIN]} streams at {share:.0%} of the bandwidth of a copy")
    if result["compile_seconds"] is not None:
        print(f"  torch.compile took {result['compile_seconds']:.0f} s, not in its row")
    print_judged(result["targets"], result["runs"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one SAM step of flatmin and of its peers, side by side.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPE_SETS), default=list(SHAPE_SETS), metavar="SET")
    parser.add_argument("--base", choices=list(BASES), default="sgd", help="optimizer under SAM (default sgd)")
    parser.add_argument("--rounds", type=int, default=30, help="steps per row and run, at least 1 (default 30)")
    parser.add_argument("--runs", type=int, default=3, help="times that everything is measured (default 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="MNIST only, one run of 3 rounds, no torch.compile")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rounds, args.runs, args.no_compile = ["mnist"], 3, 1, True
    if args.rounds < 1 or args.runs < 1 or args.threads < 1:
        parser.error("--rounds, --runs and --threads must be at least 1")
    if args.device == "cuda" and (reason := cuda_timing.unusable()):
        parser.error(f"--device cuda: {reason}")
    return args


def measure_on(name: str, base: str, device: str, threads: int, rounds: int, with_compile: bool) -> dict[str, Any]:
    """:func:`measure` on a device with so many threads, in this process."""
    torch.set_num_threads(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise prints two lines on stderr for every row
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # a kept cache would hide the time to compile
        machine = first_gpu() if device == "cuda" else cpu(compile_limits(Path(folder)), Path(folder))
        return measure(name, BASES[base], rounds, with_compile and moves_data(name), machine)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    base = BASES[args.base]
    report: dict[str, Any] = {"environment": environment(args.threads, args.rounds, args.runs), "shapes": {}}
    report["environment"]["base"] = args.base
    if args.device == "cuda":
        report["environment"] |= cuda_timing.environment()
    print_environment(report["environment"])
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in args.shapes}
    for run in range(args.runs):  # minutes lie between two runs of a shape set, as between two calls
        for name, results in measured.items():
            with_compile = run == 0 and not args.no_compile
            how = (args.device, args.threads, args.rounds, with_compile)
            results.append(in_fresh_process(measure_on, name, args.base, *how))
            report["shapes"][name] = combined(name, base, results)
            if run == args.runs - 1:
                print_report(name, base, report["shapes"][name])
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
