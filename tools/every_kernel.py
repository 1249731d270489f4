"""Calls every operator with small inputs, so that a checker that watches the process has seen each kernel at work once.

    python tools/every_kernel.py --device cuda --launched      # and says which kernels of the library were launched
    compute-sanitizer --tool memcheck python tools/every_kernel.py --device cuda
    python tools/every_kernel.py                                # the same calls on the CPU

Each call is made for every type, on dense tensors of lengths around a vector and a chunk, on a transposed one and an
empty one; reductions also over more chunks than one block folds. An operator that is in the library but not called here
is an error, and so, with ``--launched``, is a kernel that was never launched. Results are looked at only so far as they
must be finite: tests/ compares them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flatmin
from flatmin import ops
from flatmin.ops import _library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 7, 33, 1025, 4097)
MATRIX = (33, 65)
MANY_CHUNKS = 1030 * 4096 + 5  # a block of the fold takes 1024

#: A kernel in the library's strings (mangled) and in a profile (as in the source): its kind and template argument.
MANGLED = re.compile(rb"_Z\d+fm_(\w+?)_kernel(?:IL(?:i|9fm_update)(\d+)E)?")
PROFILED = re.compile(r"fm_(\w+?)_kernel(?:<(?:\(\w+\))?(\d+)>)?")

Kernel = tuple[str, int | None]


class Inputs:
    """Lists of tensors of one type on one device: parameters, gradients, and as many buffers as a step takes."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self._seed = dtype, device, 0
        self.params, self.grads = self.make(), self.make()
        self.backup = ops.backup_like(self.params)
        self.key = ops.random_key(5, 1, 0, device)
        self.norm = torch.ones((), dtype=torch.float64, device=device)
        self.corrections = torch.tensor([2.0, 1.5], dtype=torch.float64).to(device)

    def make(self) -> list[Tensor]:
        """Numbers in [0.5, 1.5): no root or quotient of them is out of range, in 16 bits either."""
        self._seed += 1
        generator = torch.Generator().manual_seed(self._seed)
        flat = [torch.rand(n, generator=generator) + 0.5 for n in LENGTHS]
        matrix = torch.rand(MATRIX, generator=generator) + 0.5
        tensors = [t.to(self.device, self.dtype, copy=True) for t in (*flat, matrix, matrix)]
        return [*tensors[:-1], tensors[-1].t()]

    def perturbed(self) -> Tensor:
        ops.sam_ascend_(self.params, self.grads, self.backup, self.norm, 0.1)
        return self.backup

    def counters(self) -> list[Tensor]:
        return [torch.ones(()) for _ in self.params]


# ---- the calls: each returns what must be finite ----


def norms(x: Inputs) -> list[Tensor]:
    found = [ops.norm(x.grads, x.params, q=q, adaptive=True) for q in (1.0, 1.5, 2.0, math.inf)]
    return [*found, ops.ties(x.grads, found[-1], x.params, adaptive=True)]


def ascents(x: Inputs) -> list[Tensor]:
    found: list[Tensor] = []
    chance = x.key if x.dtype.itemsize == 2 else None
    for q in (1.5, 2.0):
        for adaptive in (False, "asam", "davda54", "big_vision"):
            ops.sam_ascend_(x.params, x.grads, x.backup, x.norm, 0.1, q=q, adaptive=adaptive, key=chance)
            ops.restore_(x.params, x.backup)
            found.append(ops.sam_norm_ascend_(x.params, x.grads, x.backup, 0.1, q=q, adaptive=adaptive))
            ops.restore_(x.params, x.backup)
    return found + x.params


def steps(x: Inputs) -> list[Tensor]:
    for momentum in (0.0, 0.9):
        backup = x.perturbed()
        ops.restore_sgd_(x.params, x.grads, x.make() if momentum else [], backup, 0.1, momentum=momentum)
    for amsgrad in (False, True):
        backup, maxima = x.perturbed(), x.make() if amsgrad else []
        ops.restore_adam_(x.params, x.grads, x.make(), x.make(), maxima, x.counters(), backup, 0.01, amsgrad=amsgrad)
    ops.restore_lion_(x.params, x.grads, x.make(), x.perturbed(), 0.01)
    return x.params


def steps_with_averages(x: Inputs) -> list[Tensor]:
    """Of the wide types: 16-bit parameters step and average in two calls."""
    if x.dtype.itemsize == 2:
        return []
    found = []
    for lipschitz in ([], x.make()):
        average = (x.make(), lipschitz, x.perturbed(), 0.1, x.corrections)
        found.append(ops.restore_sgd_curvature_(x.params, x.grads, x.make(), *average, momentum=0.9))
        average = (x.make(), lipschitz, x.perturbed(), 0.01, x.corrections)
        moments = (x.make(), x.make(), [], x.counters())
        found.append(ops.restore_adam_curvature_(x.params, x.grads, *moments, *average))
        beside = {"curvatures": x.make(), "lipschitz": lipschitz, "corrections": x.corrections}
        found.append(ops.restore_lion_(x.params, x.grads, x.make(), x.perturbed(), 0.01, **beside))
    return [t for t in found if t is not None] + x.params


def noise(x: Inputs) -> list[Tensor]:
    found = []
    sized = {"gamma": 0.1, "eps": 0.25}
    ways: list[dict[str, Any]] = [
        sized | {"curvatures": x.grads, "lipschitz": 2.0},
        sized | {"curvatures": x.grads, "lipschitz": x.make()},
        sized,
        {"sizes": x.grads, "scale": 0.1},
    ]
    for law in ("uniform", "normal", "truncated_normal", "rademacher"):
        for way in ways:
            found.append(ops.scaled_noise_(x.params, x.backup, x.key, distribution=law, **way))
            ops.restore_(x.params, x.backup)
    return found + x.params


def probes(x: Inputs) -> list[Tensor]:
    drawn = x.make()
    for law in ("rademacher", "normal", "uniform"):
        ops.probe_(drawn, x.key, distribution=law)
    return drawn


def averages(x: Inputs) -> list[Tensor]:
    h, rho, found = x.make(), x.make(), []
    for source in ("square", "plain", "probed"):
        found.append(ops.curvature_(h, x.grads, decay=0.75, source=source, key=x.key))
        beside = {"params": x.params, "backup": x.perturbed(), "corrections": x.corrections, "lipschitz": rho}
        found.append(ops.curvature_(h, x.grads, decay=0.75, source=source, key=x.key, min_step=1e-3, **beside))
    return [*found, *h]


def measures(x: Inputs) -> list[Tensor]:
    return [ops.pacgen(x.params, x.grads, lipschitz=2.0), *ops.filter_norm(x.params)]


def combinations(x: Inputs) -> list[Tensor]:
    lists = [x.make() for _ in range(3)]
    found = [ops.gram(x.grads, *lists[:k]) for k in (1, 2, 3)]
    ops.blend_(x.grads, lists[0], coefficients=(0.5, 0.25))
    ops.blend_(x.grads, lists[0], lists[1], coefficients=(0.5, 0.25, 0.125))
    ops.axpy_(x.params, lists[2], 0.5)
    ops.axpy_(x.params, lists[2], 0.5, backup=x.backup)
    ops.save_(x.params, x.backup)
    return [*found, *x.grads, *x.params]


def labels(x: Inputs) -> list[Tensor]:
    """Of no type of the parameters, so once is enough."""
    if x.dtype != torch.float32:
        return []
    clean = (torch.arange(5000) % 10).to(x.device)
    kinds = ("exclude_true", "uniform", "pair")
    found = [ops.corrupt_labels(clean, x.key, 10, 0.5, kind=kind).float() for kind in kinds]
    index = torch.arange(5000, device=x.device).flip(0)
    found.append(ops.corrupt_labels(clean, x.key, 10, 0.5, index=index).float())
    for law in ("normal", "rademacher", "uniform"):
        found += [
            ops.draw_samples(700, 3, x.key, distribution=law),
            ops.draw_samples(5000, 1, x.key, distribution=law, index=index),
        ]
    return found


def many_chunks(x: Inputs) -> list[Tensor]:
    """Two launches of the fold, and a tensor whose sums one block folds in pieces."""
    long = [torch.full((MANY_CHUNKS,), 0.5, dtype=x.dtype, device=x.device)]
    return [ops.norm(long), ops.pacgen(long, long)] if x.dtype == torch.float32 else []


CALLS: tuple[Callable[[Inputs], list[Tensor]], ...] = (
    norms, ascents, steps, steps_with_averages, noise, probes, averages, measures, combinations,
    labels, many_chunks,
)  # fmt: skip


# ---- what was called and launched ----


def watched(called: set[str]) -> None:
    """Make the library's table of operators note who is called."""

    def noting(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            called.add(name)
            return operator(*args)

        return run

    for name, operator in _library.OPERATORS.items():
        _library.OPERATORS[name] = noting(name, operator)  # type: ignore[assignment]


def call_everything(device: torch.device) -> list[str]:
    """What went wrong, a line each."""
    wrong = []
    for dtype in DTYPES:
        for call in CALLS:
            found = call(Inputs(dtype, device))
            if not all(t.isfinite().all() for t in found):
                wrong.append(f"{call.__name__} on {dtype}: a result is not finite")
    return wrong


def kernel(kind: str, number: str | None) -> Kernel:
    return kind, None if not number else int(number)


def kernels_of(library: Path) -> set[Kernel]:
    return {kernel(kind.decode(), number.decode()) for kind, number in MANGLED.findall(library.read_bytes())}


def launched(names: Iterable[str]) -> set[Kernel]:
    return {kernel(*match.groups()) for name in names if (match := PROFILED.search(name))}


def main() -> int:
    parser = argparse.ArgumentParser(description="Call every operator of flatmin once, with small inputs.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--launched", action="store_true", help="on a GPU: name the kernels that were never launched")
    args = parser.parse_args()
    if args.device == "cuda" and "cuda" not in _library.DEVICES:
        parser.error("--device cuda: flatmin has no CUDA kernels here; `python -m flatmin` says why")
    if args.launched and args.device != "cuda":
        parser.error("--launched needs --device cuda")
    called: set[str] = set()
    watched(called)
    device = torch.device(args.device)
    if args.launched:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            wrong = call_everything(device)
            torch.cuda.synchronize()
        library = kernels_of(Path(flatmin.__file__).with_name("_C_cuda.so"))
        idle = library - launched(event.name for event in profiler.events())
        wrong += [
            f"kernel fm_{kind}_kernel {'' if number is None else number} was not launched" for kind, number in idle
        ]
        print(f"{len(library - idle)} of {len(library)} kernels launched")
    else:
        wrong = call_everything(device)
        if args.device == "cuda":
            torch.cuda.synchronize()
    wrong += [
        f"operator {name} is not called; add it to {Path(__file__).name}" for name in set(_library.OPERATORS) - called
    ]
    print(f"{len(called)} of {len(_library.OPERATORS)} operators called on {args.device}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
