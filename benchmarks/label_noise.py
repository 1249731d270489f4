"""Label noise: flatmin beside the usual torch expression and beside a copy of the same bytes.

    python benchmarks/label_noise.py                       # 10 million int64 labels
    python benchmarks/label_noise.py --labels 1000000 --json out.json
    python benchmarks/label_noise.py --quick               # seconds: does it run?

Rows, all in one run, each timed once a round in shuffled order (sam_step.py says how, and why an idle machine): 20 %
noise over all classes by ``ops.corrupt_labels``, into memory that is there (``out=``) and into new memory; the other
kinds; with an index; ``torch.where(torch.rand(n) < p, torch.randint(C, (n,)), y)``; ``copy_`` and ``clone``.

The targets are held against what writes to the same kind of memory: the noise into memory that is there against
``copy_``. The torch expression takes new memory, as it is commonly written; new memory of 80 MB costs page faults at
every call, more than the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flatmin import LabelNoise, ops
from peers import Step
from timing import (
    Figure,
    environment,
    in_fresh_process,
    interleaved,
    judged,
    pooled,
    print_environment,
    print_judged,
    settled_milliseconds,
)

CLASSES, P = 10, 0.2
OURS, NEW = "flatmin.ops.corrupt_labels, out=", "flatmin.ops.corrupt_labels, new memory"
WHERE, COPY, CLONE = "torch.where(rand < p, randint, y)", "copy_", "clone"
FASTER, WITHIN, ENOUGH_NS = 5.0, 2.0, 1.0


def steps_of(count: int) -> dict[str, Step]:
    y = torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    out, index, key = torch.zeros_like(y), torch.randperm(count), ops.random_key(1)
    table = LabelNoise(CLASSES, P, "cifar10")._table
    assert table is not None
    rows = table.bounds()

    def noise(**options: Any) -> Step:
        def step() -> None:
            ops.corrupt_labels(y, key, CLASSES, P, out=out, **options)
            key.view(torch.int32)[2].add_(1)

        return step

    return {
        OURS: noise(kind="uniform"),
        "the same, exclude_true": noise(kind="exclude_true"),
        "the same, from a table (cifar10)": noise(table=rows),
        "the same, with an index": noise(kind="uniform", index=index),
        NEW: lambda: ops.corrupt_labels(y, key, CLASSES, P, kind="uniform"),
        WHERE: lambda: torch.where(torch.rand(count) < P, torch.randint(CLASSES, (count,)), y),
        COPY: lambda: out.copy_(y),
        CLONE: y.clone,
    }


def measure(count: int, threads: int, rounds: int) -> dict[str, Any]:
    """One run: times in ms of each row, in this process."""
    torch.set_num_threads(threads)
    return {"times": interleaved(steps_of(count), rounds, "labels", settled_milliseconds)}


def figures(times: dict[str, list[float]], count: int) -> list[Figure]:
    """What is asked of flatmin, as one run measured it."""
    median, ns = {row: statistics.median(values) for row, values in times.items()}, 1e6 / count
    allowed = max(WITHIN * median[COPY] * ns, ENOUGH_NS)
    return [
        Figure(f"{OURS}: time over {WHERE}", median[OURS] / median[WHERE], 1.0 / FASTER),
        Figure(f"{OURS}: ns a label, of {WITHIN:g} times {COPY} or {ENOUGH_NS} ns", median[OURS] * ns, allowed),
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time label noise beside plain torch.")
    parser.add_argument("--labels", type=int, default=10_000_000, help="how many (default 10000000)")
    parser.add_argument("--rounds", type=int, default=20, help="steps per row and run, at least 1 (default 20)")
    parser.add_argument("--runs", type=int, default=3, help="times that everything is measured (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="100,000 labels, one run of 3 rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.labels, args.rounds, args.runs = 100_000, 3, 1
    if min(args.labels, args.rounds, args.runs, args.threads) < 1:
        parser.error("--labels, --rounds, --runs and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    described = environment(args.threads, args.rounds, args.runs)
    print_environment(described)
    runs = [in_fresh_process(measure, args.labels, args.threads, args.rounds)["times"] for _ in range(args.runs)]
    times = pooled(runs)
    median = {row: statistics.median(values) for row, values in times.items()}
    best = {row: min(values) for row, values in times.items()}
    report: dict[str, Any] = {"environment": described, "labels": args.labels, "median_ms": median, "best_ms": best}
    report |= {
        "times_as_fast": median[WHERE] / median[OURS],
        "targets": judged([figures(run, args.labels) for run in runs]),
    }
    print(f"\n{args.labels:,} int64 labels of {CLASSES} classes")
    print(f"  {'row':40} {'ms':>9} {'best':>9} {'ns a label':>12}")
    for row, value in median.items():
        print(f"  {row:40} {value:9.3f} {best[row]:9.3f} {value * 1e6 / args.labels:12.2f}")
    print(f"  {OURS}: {report['times_as_fast']:.1f} times as fast as {WHERE}")
    print_judged(report["targets"], args.runs)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
