"""Noise by curvature and the PACGen metric: flatmin beside plain torch and beside what the machine allows.

    python benchmarks/noise_step.py                       # ResNet-50's 25.6 M parameters
    python benchmarks/noise_step.py --shapes matrices --json out.json
    python benchmarks/noise_step.py --quick               # seconds: does it run?

Rows, all in one run, each timed once a round in shuffled order (sam_step.py says how, and why an idle machine):

* ``scaled_noise_``: Gaussian noise of the size min(scale / sqrt(max(H + rho N, 0)), N), N = gamma |w| + eps, on top of
  the weights, which are saved. Beside it the same in eager torch, ``Tensor.normal_`` alone, and a copy of the bytes
  that the noise has to move (reads w and H, writes w and the backup: two plain copies).
* a step of ``PerturbedOPT`` around SGD with momentum (uniform noise, restore, step, both averages) beside a step of
  ``SAM`` (norm, perturbation, restore, step); the same gradients stand in for those of a second backward.
* ``pacgen`` beside one reading of its inputs.

What the machine allows, beside the first two targets, is the copy in place of flatmin.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flatmin
from flatmin import ops
from peers import FLATMIN, Step, compile_limits, flatmin_fused, limit_steps
from shapes import SHAPE_SETS
from timing import environment, interleaved, print_environment, print_targets, settled_milliseconds, target

GAMMA, EPS, SCALE, LIPSCHITZ = 0.1, 0.1, 0.01, 0.5
LR, MOMENTUM = 1e-4, 0.9

NOISE, PACGEN, PERTURBED = "flatmin.ops.scaled_noise_", "flatmin.ops.pacgen", "flatmin.PerturbedOPT"
EAGER, NORMAL = "the same noise in eager torch", "Tensor.normal_"
COPY, READ = "copy of the same bytes", "reading the inputs of pacgen"

# row, what it is held against, times as fast at least; or at most so many times its time
FASTER = [(NOISE, EAGER, 20.0, 25.0), (NOISE, NORMAL, 5.0, 5.0)]
WITHIN = [(NOISE, COPY, 2.0), (PERTURBED, FLATMIN, 1.6), (PACGEN, READ, 2.0)]


def eager_noise(params: Sequence[Tensor], curvatures: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """As one writes it in torch, tensor by tensor; the backup is kept from step to step."""
    for w, h, o in zip(params, curvatures, old, strict=True):
        o.copy_(w)
        n = GAMMA * w.abs() + EPS
        sigma = torch.minimum(SCALE * (h + LIPSCHITZ * n).clamp(min=0.0).rsqrt(), n)
        w.add_(sigma * torch.randn_like(w))


def perturbed_step(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Step:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    base = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM)
    opt = flatmin.PerturbedOPT(base, gamma=GAMMA, eps=EPS, scale=SCALE)

    def step() -> None:
        opt.ascend()
        opt.step()

    return step


def steps_of(shapes: Sequence[tuple[int, ...]], folder: Path) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)

    def make(scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(shape, generator=generator) for shape in shapes]

    params, grads, curvatures, old = make(), make(1e-2), [h.abs_() for h in make(1e-3)], make()
    key, backup = ops.random_key(1), ops.backup_like(params)
    sized: dict[str, Any] = {"gamma": GAMMA, "eps": EPS, "lipschitz": LIPSCHITZ}

    def noise() -> None:
        ops.scaled_noise_(params, backup, key, law="normal", scale=SCALE, curvatures=curvatures, **sized)
        key.view(torch.int32)[2].add_(1)

    def normal() -> None:
        for t in old:
            t.normal_()

    def trained() -> list[Tensor]:
        return [p.clone().requires_grad_() for p in params]

    def with_grads() -> list[Tensor]:
        mine = trained()
        for p, g in zip(mine, grads, strict=True):
            p.grad = g
        return mine

    steps: dict[str, Step] = {
        NOISE: noise,
        EAGER: lambda: eager_noise(params, curvatures, old),
        NORMAL: normal,
        PERTURBED: perturbed_step(trained(), grads),
        FLATMIN: flatmin_fused(with_grads()),
        PACGEN: lambda: ops.pacgen(params, curvatures, **sized),
    }
    library = compile_limits(folder)
    if library is not None:
        limits = limit_steps(library, sum(map(math.prod, shapes)), torch.get_num_threads())

        def copy() -> None:
            limits["copy, plain stores"]()
            limits["copy, plain stores"]()

        def read() -> None:
            limits["read"]()
            limits["read"]()

        steps |= {COPY: copy, READ: read}
    return steps


def targets_of(median: dict[str, float]) -> list[dict[str, Any]]:
    found = []
    for row, rival, required, goal in FASTER:
        speed = median[rival] / median[row]
        bound = median[rival] / median[COPY] if COPY in median else None
        found.append(target(f"{row}: times as fast as {rival}", speed, required, speed >= required, goal, bound))
    for row, rival, most in WITHIN:
        if rival in median:
            over = median[row] / median[rival]
            found.append(target(f"{row}: time over {rival}", over, most, over <= most))
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time flatmin's noise and PACGen beside plain torch.")
    parser.add_argument("--shapes", choices=[name for name in SHAPE_SETS if name != "overhead"], default="resnet50")
    parser.add_argument("--rounds", type=int, default=20, help="steps per row, at least 1 (default 20)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="MNIST's shapes, 3 rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rounds = "mnist", 3
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    shapes = SHAPE_SETS[args.shapes]()
    elements = sum(map(math.prod, shapes))
    report: dict[str, Any] = {"environment": environment(args.threads, args.rounds), "shapes": args.shapes}
    print_environment(report["environment"])
    with tempfile.TemporaryDirectory() as folder:
        times = interleaved(steps_of(shapes, Path(folder)), args.rounds, args.shapes, settled_milliseconds)
    median = {row: statistics.median(values) for row, values in times.items()}
    report |= {"tensors": len(shapes), "parameters": elements, "median_ms": median, "targets": targets_of(median)}
    print(f"\n{args.shapes}: {len(shapes)} tensors, {elements:,} parameters")
    print(f"  {'row':34} {'ms':>9} {'ns per element':>15}")
    for row, value in median.items():
        print(f"  {row:34} {value:9.3f} {value * 1e6 / elements:15.2f}")
    print_targets(report["targets"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
