"""The same operators from two builds of the library, for instance gcc's and clang's: how long each takes.

    make wheel wheels
    python benchmarks/compilers.py dist/flatmin-*-linux_x86_64.whl dist/flatmin-*-manylinux_2_28_x86_64.whl

Each wheel is unpacked and runs in a process of its own, since torch takes the operators once. The processes take turns,
one of them busy at a time, in an order that changes from round to round; a round gives one ratio of the second wheel's
time to the first one's. The time is that of the processor on one thread, which other work on the machine lengthens less
than the time on the clock. The table has the median over rounds and, in brackets, the interval that holds the median
with 95 %, by the binomial law. "cache": 32 tensors of 4096 elements, "memory": the shapes of ResNet-50.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from shapes import resnet50

LEAST_SECONDS = 0.004  # a measurement repeats the operator for as long


def steps(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The operators of a training step by name, on tensors of these shapes."""
    from flatmin import ops

    generator = torch.Generator().manual_seed(1)

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    params, grads, buffers, squares = tensors(), tensors(), tensors(), [t.abs_() for t in tensors()]
    curvatures, counts = tensors(), [torch.ones(()) for _ in shapes]
    backup, key, norm = ops.backup_like(params), ops.random_key(1, 2), torch.tensor(1e3, dtype=torch.float64)
    sizes = {"curvatures": curvatures, "gamma": 0.1, "eps": 1e-3, "scale": 0.01}
    return {
        "norm": lambda: ops.norm(grads),
        "ascend": lambda: ops.sam_ascend_(params, grads, backup, norm, 1e-6),
        "restore, SGD": lambda: ops.restore_sgd_(params, grads, buffers, backup, 1e-6, momentum=0.9),
        "restore, Adam": lambda: ops.restore_adam_(params, grads, buffers, squares, [], counts, backup, 1e-6),
        "noise by curvature": lambda: ops.scaled_noise_(params, backup, key, distribution="normal", **sizes),
        "pacgen": lambda: ops.pacgen(params, curvatures, gamma=0.1, eps=1e-3, lipschitz=1.0),
    }


def work() -> None:
    """In a process of its own: for every line with a row's name, the seconds that one call takes."""
    torch.set_num_threads(1)
    sets = {"cache": [(4096,)] * 32, "memory": resnet50()}
    rows = {
        f"{place}, {str(dtype).removeprefix('torch.')}, {name}": step
        for place, shapes in sets.items()
        for dtype in (torch.float32, torch.bfloat16)
        for name, step in steps(shapes, dtype).items()
    }
    print(json.dumps(list(rows)), flush=True)
    for line in sys.stdin:
        step, calls, spent = rows[line.strip()], 0, 0.0
        step()
        start = time.thread_time()
        while spent < LEAST_SECONDS:
            step()
            calls += 1
            spent = time.thread_time() - start
        print(spent / calls, flush=True)


def median_with_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and the order statistics between which it lies with 95 %."""
    values, n = sorted(values), len(values)
    outside, below = 0.0, 0
    while (outside := outside + math.comb(n, below) * 0.5**n) <= 0.025:
        below += 1
    return statistics.median(values), values[max(below - 1, 0)], values[min(n - below, n - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs=2, type=Path, metavar="wheel")
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number, wheel in enumerate(args.wheels):
            unpacked = Path(folder, str(number))
            zipfile.ZipFile(wheel).extractall(unpacked)
            path = os.pathsep.join([str(unpacked), os.environ.get("PYTHONPATH", "")])
            workers.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--work"],
                    env={**os.environ, "PYTHONPATH": path},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        names, _ = (json.loads(worker.stdout.readline()) for worker in workers)  # type: ignore[union-attr]
        times: dict[str, list[list[float]]] = {name: [[], []] for name in names}
        shuffled = random.Random(0)
        for _ in range(args.rounds):
            for name in names:
                for number in shuffled.sample((0, 1), 2):
                    worker = workers[number]
                    assert worker.stdin is not None and worker.stdout is not None
                    print(name, file=worker.stdin, flush=True)
                    times[name][number].append(float(worker.stdout.readline()))
        for worker in workers:
            worker.communicate()
    print(f"{'ms, medians':44}{'first':>9}{'second':>9}{'ratio':>9}")
    for name, (first, second) in times.items():
        middle, low, high = median_with_interval([b / a for a, b in zip(first, second, strict=True)])
        medians = (statistics.median(first) * 1e3, statistics.median(second) * 1e3)
        print(f"{name:44}{medians[0]:9.3f}{medians[1]:9.3f}{middle:9.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work()
    else:
        main()
