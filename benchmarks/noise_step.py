"""Noise by curvature and the PACGen metric: flatmin beside plain torch and beside what the machine allows.

    python benchmarks/noise_step.py                       # ResNet-50's 25.6 M parameters, three runs
    python benchmarks/noise_step.py --shapes matrices --json out.json
    python benchmarks/noise_step.py --quick               # seconds: does it run?
    python benchmarks/noise_step.py --device cuda         # on the first GPU

Rows, each timed once a round in shuffled order (sam_step.py says how, why an idle machine and why three runs):

* ``scaled_noise_``: Gaussian noise of the size min(scale / sqrt(max(H + rho N, 0)), N), N = gamma |w| + eps, on top of
  the weights, which are saved. Beside it the same in eager torch, ``Tensor.normal_`` alone, and a copy of the bytes
  that the noise has to move (reads w and H, writes w and the backup: two plain copies).
* a step of ``PerturbedOPT`` around SGD with momentum (uniform noise, restore, step, both averages) beside a step of
  ``SAM`` (norm, perturbation, restore, step); the same gradients stand in for those of a second backward.
* ``pacgen`` beside one reading of its inputs.

What is asked of flatmin is what a kernel can give on any machine: the noise within 2.0 times the copy, a step under
noise within 1.6 times a step of SAM, PACGen within 2.0 times the reading. How far torch is from the copy differs from
machine to machine: that ratio is reported. On a GPU a copy by torch stands for the reading, half as long, and ``model``
is the time that docs/traffic.md predicts from the bandwidth of a copy of 1 GiB.
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

import cuda_timing
import flatmin
from flatmin import ops
from peers import FLATMIN, STREAMS, Step, compile_limits, flatmin_parts, in_turn, limit_steps
from shapes import SHAPE_SETS, Shape
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

GAMMA, EPS, SCALE, LIPSCHITZ = 0.1, 0.1, 0.01, 0.5
LR, MOMENTUM = 1e-4, 0.9

NOISE, PACGEN, PERTURBED = "flatmin.ops.scaled_noise_", "flatmin.ops.pacgen", "flatmin.PerturbedOPT"
EAGER, NORMAL = "the same noise in eager torch", "Tensor.normal_"
COPY, READ = "copy of the same bytes", "reading the inputs of pacgen"

ITEMSIZE = 4
#: Passes over the elements, from docs/traffic.md.
MODEL_STREAMS = {NOISE: 4, PERTURBED: 11, FLATMIN: STREAMS[FLATMIN], PACGEN: 2}

REPORTED = [(NOISE, EAGER), (NOISE, NORMAL)]  # row, what it is compared with
REQUIRED = [(NOISE, COPY, 2.0), (PERTURBED, FLATMIN, 1.6), (PACGEN, READ, 2.0)]  # at most so many times its time


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


def steps_of(shapes: Sequence[Shape], folder: Path, device: torch.device) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)

    def make(scale: float = 1.0) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=generator)).to(device) for shape in shapes]

    params, grads, curvatures, old = make(), make(1e-2), [h.abs_() for h in make(1e-3)], make()
    key, backup = ops.random_key(1, device=device), ops.backup_like(params)
    sized: dict[str, Any] = {"gamma": GAMMA, "eps": EPS, "lipschitz": LIPSCHITZ}

    def noise() -> None:
        ops.scaled_noise_(params, backup, key, distribution="normal", scale=SCALE, curvatures=curvatures, **sized)
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
        FLATMIN: in_turn(flatmin_parts)(with_grads()),
        PACGEN: lambda: ops.pacgen(params, curvatures, **sized),
    }
    elements = sum(map(math.prod, shapes))
    return steps | (limits_on_gpu(elements) if device.type == "cuda" else limits_on_cpu(elements, folder))


def limits_on_cpu(elements: int, folder: Path) -> dict[str, Step]:
    library = compile_limits(folder)
    if library is None:
        return {}
    limits = limit_steps(library, elements, torch.get_num_threads())

    def copy() -> None:
        limits["copy, plain stores"]()
        limits["copy, plain stores"]()

    def read() -> None:
        limits["read"]()
        limits["read"]()

    return {COPY: copy, READ: read}


def limits_on_gpu(elements: int) -> dict[str, Step]:
    """A copy moves two streams, as many as PACGen reads."""
    pairs = [[torch.zeros(elements, device=cuda_timing.DEVICE) for _ in range(2)] for _ in range(2)]

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return {COPY: copy, READ: lambda: pairs[0][0].copy_(pairs[0][1])} | cuda_timing.copy_step()


def measure_on(name: str, device: str, threads: int, rounds: int) -> dict[str, Any]:
    """One run: times in ms of each row, in this process."""
    torch.set_num_threads(threads)
    on_gpu = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        steps = steps_of(SHAPE_SETS[name](), Path(folder), cuda_timing.DEVICE if on_gpu else torch.device("cpu"))
        for step in steps.values():
            step()
        return {"times": interleaved(steps, rounds, name, cuda_timing.milliseconds if on_gpu else settled_milliseconds)}


def figures(times: dict[str, list[float]]) -> list[Figure]:
    """What is asked of flatmin, as far as one run measured it."""
    median = {row: statistics.median(values) for row, values in times.items()}
    return [
        Figure(f"{row}: time over {rival}", median[row] / median[rival], most)
        for row, rival, most in REQUIRED
        if rival in median
    ]


def combined(runs: Sequence[dict[str, Any]], elements: int) -> dict[str, Any]:
    median = {row: statistics.median(values) for row, values in pooled([run["times"] for run in runs]).items()}
    model = {}
    if (copy := median.get(cuda_timing.COPY)) is not None:
        size = ITEMSIZE * elements
        model = {row: cuda_timing.predicted_ms(n * size, copy) for row, n in MODEL_STREAMS.items()}
    return {
        "median_ms": median,
        "model_ms": model,
        "times_as_fast": {f"{row}: times as fast as {rival}": median[rival] / median[row] for row, rival in REPORTED},
        "targets": judged([figures(run["times"]) for run in runs]),
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{report['shapes']}: {report['tensors']} tensors, {report['parameters']:,} parameters")
    print(f"  {'row':34} {'ms':>9} {'ns per element':>15}" + f" {'model':>7}" * bool(report["model_ms"]))
    for row, value in report["median_ms"].items():
        model = f"{report['model_ms'][row]:7.3f}" if row in report["model_ms"] else ""
        print(f"  {row:34} {value:9.3f} {value * 1e6 / report['parameters']:15.2f} {model}".rstrip())
    for which, speed in report["times_as_fast"].items():
        print(f"  {which}: {speed:.1f}")
    print_judged(report["targets"], report["environment"]["runs"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time flatmin's noise and PACGen beside plain torch.")
    parser.add_argument("--shapes", choices=[name for name in SHAPE_SETS if name != "overhead"], default="resnet50")
    parser.add_argument("--rounds", type=int, default=20, help="steps per row and run, at least 1 (default 20)")
    parser.add_argument("--runs", type=int, default=3, help="times that everything is measured (default 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU (default cpu)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="MNIST's shapes, one run of 3 rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.rounds, args.runs = "mnist", 3, 1
    if args.rounds < 1 or args.runs < 1 or args.threads < 1:
        parser.error("--rounds, --runs and --threads must be at least 1")
    if args.device == "cuda" and (reason := cuda_timing.unusable()):
        parser.error(f"--device cuda: {reason}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    shapes = SHAPE_SETS[args.shapes]()
    elements = sum(map(math.prod, shapes))
    report: dict[str, Any] = {"environment": environment(args.threads, args.rounds, args.runs), "shapes": args.shapes}
    if args.device == "cuda":
        report["environment"] |= cuda_timing.environment()
    print_environment(report["environment"])
    runs = [in_fresh_process(measure_on, args.shapes, args.device, args.threads, args.rounds) for _ in range(args.runs)]
    report |= {"tensors": len(shapes), "parameters": elements} | combined(runs, elements)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
