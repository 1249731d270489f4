"""Noise on labels finds the sparse solution that gradient descent and noise on weights miss.

The regression ``f(x) = <v o v, x>`` (o: element by element) in 100 dimensions has 40 data points, made by a w* of which
5 entries are not 0. There are many v that fit all 40. From the same start, all ones, with the loss
``(y - f)^2 / 4``, run

* gradient descent;
* gradient descent with label noise: each step one point, chosen at random, has its label moved by a normal number;
* gradient descent with spherical noise: each step every weight has a normal number added to its gradient

for the same number of steps (after HaoChen et al. 2020, arXiv 2006.08680; rates and sizes are those of its code). Label
noise makes weights that matter little shrink: what is left is w*. The command fails if it is not.

    python examples/label_noise/quadratic.py --out out/quadratic
    python examples/label_noise/quadratic.py --out out/quadratic --plot-only
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import flatmin
from _common.errors import UsageError
from _common.figures import INK, figure, save, styled
from _common.files import read_json, write_json
from _common.flags import common_flags, main, positive_int
from _common.progress import bar
from _common.runs import one_thread, seed_of

DIMENSION, POINTS, NONZERO = 100, 40, 5
LR, LABEL_NOISE, WEIGHT_NOISE = 0.01, 1.0, 0.01
METHODS = ("gradient descent", "label noise", "spherical noise")
COLOURS = {"gradient descent": "#f2b134", "label noise": "#c1440e", "spherical noise": "#33658a"}
BLOCK = 500  # steps whose random numbers are drawn at once, and after which the error is recorded
FOUND, MISSED = 0.01, 1.0  # squared distances that say whether w* was found
REAL = torch.float64


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [40, 100], standard normal, and w* [100]: ones on 5 places chosen at random."""
    g = torch.Generator().manual_seed(seed_of("quadratic", seed))
    x = torch.randn(POINTS, DIMENSION, generator=g, dtype=REAL)
    w = torch.zeros(DIMENSION, dtype=REAL)
    w[torch.randperm(DIMENSION, generator=g)[:NONZERO]] = 1.0
    return x, w


def train(seeds: Sequence[int], steps: int, label: str = "quadratic model") -> dict[str, Any]:
    """All seeds and methods at once: one weight vector each, so that a step costs a few operations on [runs, 40, 100].

    The rate falls to a tenth after each third of the steps.
    """
    problems = [problem(seed) for seed in seeds]
    x = torch.stack([p[0] for p in problems]).repeat_interleave(len(METHODS), 0)
    target = torch.stack([p[1] for p in problems]).repeat_interleave(len(METHODS), 0)
    runs = len(x)
    y = (x @ target.unsqueeze(2)).squeeze(2)
    g = torch.Generator().manual_seed(seed_of("noise", *seeds))
    on_labels = flatmin.RegressionNoise(LABEL_NOISE, "normal", generator=g)
    on_weights = flatmin.RegressionNoise(WEIGHT_NOISE, "normal", generator=g)
    has_label_noise, has_weight_noise = (
        torch.tensor([m == name for m in METHODS], dtype=REAL).repeat(len(seeds)) for name in METHODS[1:]
    )
    v, transposed = torch.ones(runs, DIMENSION, dtype=REAL), x.transpose(1, 2).contiguous()
    errors = [(v.square() - target).square().sum(1)]
    shown = bar(total=steps, desc=label, unit="step", unit_scale=True)
    for begin in range(0, steps, BLOCK):
        count = min(BLOCK, steps - begin)
        # the noisy label of one random point: as much on its residual, times the 40 that the mean divides by
        moved = POINTS * on_labels(torch.zeros(count, runs, dtype=REAL)) * has_label_noise
        chosen = torch.zeros(count, runs, POINTS, dtype=REAL)
        chosen.scatter_(2, torch.randint(POINTS, (count, runs, 1), generator=g), moved.unsqueeze(2))
        kicks = on_weights(torch.zeros(count, runs, DIMENSION, dtype=REAL)) * has_weight_noise.unsqueeze(1)
        for k in range(count):
            lr = LR * 0.1 ** (3 * (begin + k) // steps)
            residual = torch.baddbmm(-y.unsqueeze(2), x, v.square().unsqueeze(2)) - chosen[k].unsqueeze(2)
            gradient = torch.bmm(transposed, residual).squeeze(2).mul_(v).div_(POINTS)
            v = v - lr * gradient.add_(kicks[k])
        errors.append((v.square() - target).square().sum(1))
        shown.update(count)
    shown.close()
    loss = 0.25 * ((x @ v.square().unsqueeze(2)).squeeze(2) - y).square().mean(1)
    shape = (len(seeds), len(METHODS))
    return {
        "steps": [min(i * BLOCK, steps) for i in range(len(errors))],
        "errors": torch.stack(errors, 1).view(*shape, -1).tolist(),  # [seed][method][record]
        "losses": loss.view(shape).tolist(),
        "solutions": v.square().view(*shape, -1).tolist(),
        "targets": [p[1].tolist() for p in problems],
    }


def plot(result: dict[str, Any], path: Path) -> None:
    with styled():
        fig = figure(12.0, 4.8)
        left, right = fig.subplots(1, 2, width_ratios=(1.0, 1.15))
        for m, name in reversed(list(enumerate(METHODS))):  # the dashes of gradient descent over spherical noise
            style: dict[str, Any] = {"color": COLOURS[name], "linestyle": "--" if m == 0 else "-"}
            for seed, errors in enumerate(result["errors"]):
                left.plot(result["steps"], errors[m], linewidth=1.6, label=name if seed == 0 else None, **style)
        left.set_yscale("log")
        left.set_xlabel("steps")
        left.set_xticks([0, result["steps"][-1] / 3, 2 * result["steps"][-1] / 3, result["steps"][-1]])
        left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        left.set_ylabel(r"squared distance $\|v \odot v - w^*\|^2$")
        left.set_title(f"Distance to the sparse solution, {len(result['errors'])} problems")
        left.legend(loc="center right")
        target, solutions = result["targets"][0], result["solutions"][0]
        order = sorted(range(len(target)), key=lambda i: -target[i])
        for m, name in reversed(list(enumerate(METHODS))):
            values = [solutions[m][i] for i in order]
            right.plot(range(1, len(values) + 1), values, ".", markersize=(5, 7, 9)[m], color=COLOURS[name], label=name)
        right.step(
            range(1, len(order) + 1), [target[i] for i in order], where="mid", color=INK, linewidth=1.0, label=r"$w^*$"
        )
        right.set_yscale("symlog", linthresh=1e-3, linscale=0.4)
        right.set_ylim(-2e-4, 60.0)
        right.set_xlabel("entry, those of $w^*$ that are not 0 first")
        right.set_ylabel(r"$v \odot v$ at the end")
        right.set_title("The solutions of the first problem")
        right.legend(loc="upper right", ncols=2)
        save(fig, path)


def report(result: dict[str, Any]) -> bool:
    """Print the table; whether label noise found w* and the others did not."""
    print(f"\n{'method':18} {'squared distance to w*, by problem':44} training loss")
    as_stated = True
    for m, name in enumerate(METHODS):
        last = [errors[m][-1] for errors in result["errors"]]
        losses = [loss[m] for loss in result["losses"]]
        print(f"{name:18} {'  '.join(f'{e:9.4g}' for e in last):44} {max(losses):.2g} at most")
        as_stated &= all((e < FOUND) if name == "label noise" else (e > MISSED) for e in last)
    return as_stated


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_flags(parser, "out/quadratic")
    parser.add_argument("--problems", type=positive_int, default=2, metavar="N", help="with seeds of their own (2)")
    parser.add_argument("--steps", type=positive_int, default=300_000, metavar="N", help="of each run (300000)")
    return parser.parse_args(argv)


def run(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    path = args.out / "quadratic.json"
    if not args.plot_only:
        with one_thread(), torch.no_grad():
            result = train(range(args.seed, args.seed + args.problems), args.steps)
        write_json(path, {"settings": {"seed": args.seed, "problems": args.problems, "steps": args.steps}, **result})
    result = read_json(path)
    plot(result, args.out / "quadratic.png")
    as_stated = report(result)
    print(f"\n{args.out / 'quadratic.png'}, {path}")
    if not as_stated:
        raise UsageError("label noise did not find w*, or another method did; are there enough steps (300000)?")


if __name__ == "__main__":
    main(run)
