"""A sharp and a flat minimum that one can look at: PACGen on a loss surface over two weights.

A network of five layers, all of them the same 2x2 matrix without bias, sigmoids between them, cross-entropy at the end.
Two entries of the matrix are free, two are held constant, so the loss is a surface over the plane (w1, w2). The data
are 100 points of a mixture of three Gaussians in the plane; a point is labelled 1 where the density of the mixture is
above its median over the 100 points (after Wang et al. 2018, arXiv 1809.07402, section 3; what its authors held
constant, and of what they took the median, is not known).

A pair of minima is searched for, by loss and curvature alone (see :func:`pairs_of`). Then PACGen is computed from exact
Hessians. The command fails if the sharp minimum does not have the larger PACGen.

    python examples/pacgen/toy_surface.py --out out/toy
    python examples/pacgen/toy_surface.py --out out/toy --survey 2000     # how often does PACGen agree with curvature?
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from _toy_figures import plot_bound, plot_labels, plot_surface
from _toy_problem import (
    DELTA,
    EPS,
    FINE,
    GAMMA,
    LAYERS,
    REAL,
    Problem,
    best_eta,
    gradients,
    hessians,
    loss,
    make_problem,
    margin,
    pacgen,
)
from torch import Tensor

from _common.errors import UsageError
from _common.files import read_json, write_json
from _common.flags import common_flags, main, positive_int
from _common.intervals import share_interval
from _common.progress import bar
from _common.runs import one_thread

REACH = 16.0  # the search covers |w1|, |w2| <= REACH

# What makes a pair. None of it uses PACGen.
WITHIN = 0.1  # nats that the flat minimum may lie above the sharp one
BETTER = 0.03  # nats that both lie below log 2, the loss of a coin
SHARPER = 2.0  # ratio of the largest eigenvalues


# ---- search ----


class Pair(NamedTuple):
    """The sharp and the flat minimum of a problem: ``w`` [2, 2] and :func:`pacgen`'s values, with "loss" and
    "accuracy", in this order."""

    problem: Problem
    w: Tensor
    values: dict[str, Tensor]


def grid(points: int) -> Tensor:
    """[points^2, 2]"""
    axis = torch.linspace(-REACH, REACH, points, dtype=REAL)
    return torch.cartesian_prod(axis, axis)


def candidates(problem: Problem, points: int = 129) -> Tensor:
    """Grid points [n, 2] inside the border that are no higher than their eight neighbours, lowest first; none if the
    lowest point of the grid lies on its border."""
    w = grid(points)
    # float32 finds the valleys; the refinement is in float64
    values = torch.cat([loss(rows, problem) for rows in w.float().split(1024)]).view(points, points)
    padded = F.pad(values, (1, 1, 1, 1), value=math.inf)
    shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    around = torch.stack([padded[i : i + points, j : j + points] for i, j in shifts]).amin(0)
    inside = torch.zeros_like(values, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    low = (values <= around) & inside
    if not low.any() or values[low].min() > values.min():
        return w[:0]
    chosen = low.flatten().nonzero().squeeze(1)
    return w[chosen[values.flatten()[chosen].argsort()]]


def refine(w: Tensor, problem: Problem, steps: int = 40) -> Tensor:
    """Minima [n, 2] that damped Newton steps reach from ``w``; those that are none are left out, and so are copies.

    A step divides the gradient by the absolute eigenvalues, so it descends everywhere, and is no longer than 0.2.
    """
    for _ in range(steps):
        values, vectors = torch.linalg.eigh(hessians(w, problem))
        along = (vectors.mT @ gradients(w, problem).unsqueeze(-1)).squeeze(-1) / values.abs().clamp(min=1e-3)
        step = (vectors @ along.unsqueeze(-1)).squeeze(-1)
        w = w - step * (0.2 / step.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    still = gradients(w, problem).norm(dim=-1) < 1e-9
    convex = torch.linalg.eigvalsh(hessians(w, problem))[:, 0] > 0.0
    w = w[still & convex & (w.abs().amax(-1) < REACH)]
    apart: list[Tensor] = []
    for point in w:
        if all((point - other).norm() > 1e-3 for other in apart):
            apart.append(point)
    return torch.stack(apart) if apart else w[:0]


def pairs_of(problem: Problem) -> Iterator[Pair]:
    """The global optimum of the surface with each other minimum that is flatter, at most one of them.

    A pair: both lie :data:`BETTER` below the loss of a coin and within :data:`WITHIN` of each other, and the largest
    eigenvalue of the Hessian at the first is :data:`SHARPER` times that at the second. Of several flat ones the one of
    lowest loss counts.
    """
    start = candidates(problem)
    if len(start) < 2:
        return
    rough = loss(start, problem)
    # a grid of 0.25 misses the bottom of a valley by its curvature times 0.25^2 / 4, 0.05 at a curvature of 3
    start = start[(rough < rough[0] + WITHIN + 0.05) & (rough < math.log(2.0) - BETTER + 0.05)]
    if len(start) < 2:
        return
    w = refine(start, problem)
    values = loss(w, problem)
    order = values.argsort()
    w, values = w[order], values[order]
    if len(w) < 2 or values[0] > rough.min() or values[0] > math.log(2.0) - BETTER:
        return
    largest = torch.linalg.eigvalsh(hessians(w, problem))[:, -1]
    flat = (values < values[0] + WITHIN) & (values < math.log(2.0) - BETTER) & (largest * SHARPER < largest[0])
    if not flat.any():
        return
    both = w[[0, int(flat.nonzero()[0])]]
    right = (margin(both, problem, problem.x) > 0) == (problem.y > 0)
    about = {"loss": loss(both, problem), "accuracy": 100.0 * right.double().mean(-1)}
    yield Pair(problem, both, about | pacgen(both, problem))


def limited_by_curvature(pair: Pair) -> bool:
    """Whether PACGen can tell the two apart by curvature: at the sharp minimum curvature limits the noise of a weight,
    at the flat one of none. Otherwise all noise fills its neighbourhood, and PACGen depends on ``|w|`` alone."""
    pressure = pair.values["pressure"]
    return bool((pressure[0] > 1.0).any() and (pressure[1] <= 1.0).all())


def search(args: argparse.Namespace) -> tuple[Pair, dict[str, Any]]:
    """The first pair of which :func:`limited_by_curvature` is true, and what was seen on the way.

    Goes on from ``search.json``. With ``--survey`` that many problems are looked at, whenever the pair is found.
    """
    path = args.out / "search.json"
    seen: dict[str, Any] = {"seed": args.seed, "problems": 0, "found": None, "pairs": 0, "agree": 0}
    seen |= {"pairs_by_curvature": 0, "agree_by_curvature": 0}
    if path.is_file() and (kept := read_json(path))["seed"] == args.seed:
        seen = kept
    end = args.limit if seen["found"] is None else args.survey
    with bar(range(seen["problems"], max(end, args.survey)), desc="Searching", unit="problem") as numbers:
        for number in numbers:
            if seen["found"] is not None and number >= args.survey:
                break
            for pair in pairs_of(make_problem(args.seed, number)):
                psi = pair.values["psi"]
                agree, by_curvature = int(psi[0] > psi[1]), limited_by_curvature(pair)
                seen["pairs"] += 1
                seen["agree"] += agree
                seen["pairs_by_curvature"] += int(by_curvature)
                seen["agree_by_curvature"] += by_curvature * agree
                if by_curvature and seen["found"] is None:
                    seen["found"] = number
            seen["problems"] = number + 1
            write_json(path, seen)
    if seen["found"] is None:
        raise UsageError(f"no pair of minima among {seen['problems']} problems; raise --limit or try another --seed")
    return next(pairs_of(make_problem(args.seed, seen["found"]))), seen


# ---- results ----


def surface(pair: Pair, points: int) -> dict[str, Any]:
    """Loss and PACGen over the plane around both minima, as nested lists."""
    low, high = pair.w.amin(0), pair.w.amax(0)
    pad = 0.35 * (high - low).amax() + 1.0
    axes = [torch.linspace(float(a - pad), float(b + pad), points, dtype=REAL) for a, b in zip(low, high, strict=True)]
    w = torch.cartesian_prod(*axes)
    psi = [pacgen(rows, pair.problem)["psi"] for rows in bar(w.split(points), desc="Surface", unit="row")]
    shape = (points, points)
    fine = [torch.linspace(float(axis[0]), float(axis[-1]), FINE, dtype=REAL) for axis in axes]
    relief = torch.cat([loss(rows, pair.problem) for rows in torch.cartesian_prod(*fine).split(1024)])
    return {
        "w1": axes[0].tolist(),
        "w2": axes[1].tolist(),
        "loss": loss(w, pair.problem).view(shape).tolist(),
        "psi": torch.cat(psi).view(shape).tolist(),
        "relief": [[round(z, 4) for z in row] for row in relief.view(FINE, FINE).tolist()],
    }


def label_maps(pair: Pair, points: int = 160) -> dict[str, Any]:
    """True labels and those predicted at both minima, over the plane of the inputs."""
    x = pair.problem.x
    low, high = x.amin(0) - 0.4, x.amax(0) + 0.4
    axes = [torch.linspace(float(a), float(b), points, dtype=REAL) for a, b in zip(low, high, strict=True)]
    plane = torch.cartesian_prod(*axes)
    maps = {"true": pair.problem.density(plane) > pair.problem.level}
    for i, name in enumerate(("sharp", "flat")):
        maps[name] = margin(pair.w[i], pair.problem, plane) > 0
    rows = {n: ["".join(map(str, row)) for row in m.view(points, points).int().tolist()] for n, m in maps.items()}
    return {"x1": axes[0].tolist(), "x2": axes[1].tolist(), **rows}


def describe(pair: Pair, index: int) -> dict[str, Any]:
    """One minimum in numbers."""
    v = {key: value[index] for key, value in pair.values.items()}
    return {
        "w": pair.w[index].tolist(),
        "loss": float(v["loss"]),
        "accuracy": float(v["accuracy"]),
        "hessian": v["hessian"].tolist(),
        "eigenvalues": torch.linalg.eigvalsh(v["hessian"]).tolist(),
        "lipschitz": float(v["lipschitz"]),
        "pressure": v["pressure"].tolist(),
        "psi": float(v["psi"]),
    }


# ---- command line ----


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common_flags(parser, "out/toy")
    add = parser.add_argument
    add("--limit", type=positive_int, default=20_000, metavar="N", help="give up after N problems (20000)")
    add("--survey", type=int, default=0, metavar="N", help="look at N problems, and count how often PACGen agrees (0)")
    add("--points", type=positive_int, default=61, metavar="N", help="points along each axis of the surface (61)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Search, write ``toy.json``, draw, and fail if the ordering does not hold."""
    path = args.out / "toy.json"
    if not args.plot_only:
        with one_thread():  # the tensors are small: threads would wait for each other
            pair, seen = search(args)
            values = surface(pair, args.points)
        problem = pair.problem
        settings = {"seed": args.seed, "problem": problem.number, "free": problem.free, "held": problem.held}
        settings |= {"gamma": GAMMA, "eps": EPS, "layers": LAYERS, "delta": DELTA}
        write_json(
            path,
            {
                "settings": settings,
                "search": seen,
                "sharp": describe(pair, 0),
                "flat": describe(pair, 1),
                "eta": best_eta(np.array(values["loss"]), np.array(values["psi"])),
                "x": problem.x.tolist(),
                "y": problem.y.tolist(),
                "surface": values,
                "labels": label_maps(pair),
            },
        )
    result = read_json(path)
    plot_surface(result, args.out / "surface.png")
    plot_bound(result, args.out / "bound.png")
    plot_labels(result, args.out / "labels.png")
    seen = result["search"]
    print(f"problem {result['settings']['problem']} of seed {result['settings']['seed']}, {seen['problems']} looked at")
    for name in ("sharp", "flat"):
        m = result[name]
        print(
            f"{name:5}  w = ({m['w'][0]:.3f}, {m['w'][1]:.3f})  loss {m['loss']:.4f}  PACGen {m['psi']:.4f}  "
            f"eigenvalues {m['eigenvalues'][0]:.4f}, {m['eigenvalues'][1]:.4f}  rho {m['lipschitz']:.3f}  "
            f"{m['accuracy']:.0f} % right"
        )
    print(f"eta {result['eta']:.2f}")
    for kind, among in (("", "pairs"), ("_by_curvature", "pairs where curvature limits the noise")):
        count, of = seen[f"agree{kind}"], seen[f"pairs{kind}"]
        share = share_interval(count, of)
        print(f"PACGen ranks the sharper minimum higher in {count} of {of} {among}: {share:.0f} %")
    sharp, flat = result["sharp"]["psi"], result["flat"]["psi"]
    if not sharp > flat:
        raise UsageError(f"PACGen of the sharp minimum, {sharp:.4f}, is not above that of the flat one, {flat:.4f}")


if __name__ == "__main__":
    main(lambda: run(parse_args(None)))
