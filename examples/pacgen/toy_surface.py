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
from torch import Tensor

from _common.errors import UsageError
from _common.figures import figure, save, styled
from _common.files import read_json, write_json
from _common.flags import common_flags, main, positive_int
from _common.intervals import share_interval
from _common.progress import bar
from _common.runs import one_thread, seed_of
from flatmin import ops

GAMMA = EPS = 0.1
LAYERS, POINTS, DELTA = 5, 100, 0.05
REACH = 16.0  # the search covers |w1|, |w2| <= REACH
HELD = 6.0  # and held values within +-HELD: larger ones make steps of the sigmoids
# Which entries of the matrix are free: its diagonal, a row, a column, or its other diagonal.
FREE = ((0, 3), (0, 1), (0, 2), (1, 2))

# What makes a pair. None of it uses PACGen.
WITHIN = 0.1  # nats that the flat minimum may lie above the sharp one
BETTER = 0.03  # nats that both lie below log 2, the loss of a coin
SHARPER = 2.0  # ratio of the largest eigenvalues

FINE = 141  # points along each axis of the relief, which needs no Hessian
REAL = torch.float64


class Problem(NamedTuple):
    """A surface. ``x`` [n, 2], ``y`` [n] in {0, 1}, mixture ``means`` and ``scales`` [3, 2], ``level`` of the density
    that separates the labels, ``free`` positions in the matrix, and ``held`` values at the other two."""

    number: int
    x: Tensor
    y: Tensor
    means: Tensor
    scales: Tensor
    level: Tensor
    free: tuple[int, int]
    held: tuple[float, float]

    def density(self, x: Tensor) -> Tensor:
        """Of the mixture at ``x`` [..., 2], up to a constant factor."""
        z = (x.unsqueeze(-2) - self.means) / self.scales
        return (torch.exp(-0.5 * z.square().sum(-1)) / self.scales.prod(-1)).mean(-1)


def make_problem(seed: int, number: int) -> Problem:
    """The ``number``-th problem of a search: data, free entries and held values all follow from the two integers."""
    g = torch.Generator().manual_seed(seed_of("toy", seed, number))
    means = 4.0 * torch.rand(3, 2, generator=g, dtype=REAL) - 2.0
    scales = 0.4 + 0.6 * torch.rand(3, 2, generator=g, dtype=REAL)
    component = torch.randint(0, 3, (POINTS,), generator=g)
    x = means[component] + scales[component] * torch.randn(POINTS, 2, generator=g, dtype=REAL)
    held = (2.0 * HELD * torch.rand(2, generator=g, dtype=REAL) - HELD).tolist()
    free = FREE[int(torch.randint(0, len(FREE), (), generator=g))]
    problem = Problem(number, x, torch.zeros(POINTS), means, scales, torch.zeros(()), free, (held[0], held[1]))
    density = problem.density(x)
    level = density.quantile(0.5)
    return problem._replace(y=(density > level).to(x.dtype), level=level)


# ---- the network ----


def margin(w: Tensor, problem: Problem, x: Tensor) -> Tensor:
    """Logit of label 1 less logit of label 0: [..., n] for weights [..., 2] and points [n, 2]."""
    held = iter(problem.held)
    entries = (w[..., problem.free.index(i), None] if i in problem.free else next(held) for i in range(4))
    a, b, c, d = entries
    # written out: a batched product of 2x2 matrices takes ten times as long
    h0, h1 = a * x[:, 0] + b * x[:, 1], c * x[:, 0] + d * x[:, 1]
    for _ in range(LAYERS - 1):
        h0, h1 = torch.sigmoid(h0), torch.sigmoid(h1)
        h0, h1 = a * h0 + b * h1, c * h0 + d * h1
    return h1 - h0


def loss(w: Tensor, problem: Problem) -> Tensor:
    """Mean cross-entropy in nats, [...] for weights [..., 2]."""
    sign = 2.0 * problem.y.to(w.dtype) - 1.0
    return F.softplus(-sign * margin(w, problem, problem.x.to(w.dtype))).mean(-1)


def gradients(w: Tensor, problem: Problem) -> Tensor:
    """[n, 2] for weights [n, 2]."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w, problem).sum(), w)[0]


def hessians(w: Tensor, problem: Problem, chunk: int = 512) -> Tensor:
    """Exact, [n, 2, 2] for weights [n, 2], by differentiating twice.

    No two of the n losses share a weight, so the gradient of their sum holds the gradient of each. In chunks whose
    temporaries stay in the cache: all at once takes twice as long.
    """
    rows = []
    for v in w.detach().split(chunk):
        v.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(v, problem).sum(), v, create_graph=True)
        parts = [torch.autograd.grad(gradient[:, i].sum(), v, retain_graph=i == 0)[0] for i in range(2)]
        rows.append(torch.stack(parts, 1))
    return torch.cat(rows) if rows else w.new_zeros(0, 2, 2)


# ---- PACGen ----


def neighbourhood(w: Tensor) -> Tensor:
    """``N_i = gamma |w_i| + eps``."""
    return GAMMA * w.abs() + EPS


def lipschitz(w: Tensor, hessian: Tensor, problem: Problem, steps: int = 9) -> Tensor:
    """Lipschitz constant of the Hessian in the neighbourhood of each of the weights [n, 2].

    The largest ``||H(w + u) - H(w)||_2 / ||u||_2`` over a grid of ``steps`` x ``steps`` points of the box
    ``|u_i| <= N_i``, all with exact Hessians.
    """
    axis = torch.linspace(-1.0, 1.0, steps, dtype=REAL)
    u = torch.cartesian_prod(axis, axis)
    u = u[u.abs().sum(1) > 0] * neighbourhood(w).unsqueeze(1)
    there = hessians((w.unsqueeze(1) + u).flatten(0, 1), problem).unflatten(0, u.shape[:2])
    return (spectral_norm(there - hessian.unsqueeze(1)) / u.norm(dim=-1)).amax(1)


def spectral_norm(a: Tensor) -> Tensor:
    """Of symmetric 2x2 matrices, from the closed form of their eigenvalues: 20 times as fast as an SVD of each."""
    mean, half = (a[..., 0, 0] + a[..., 1, 1]) / 2, (a[..., 0, 0] - a[..., 1, 1]) / 2
    return mean.abs() + torch.hypot(half, a[..., 0, 1])


def pacgen(w: Tensor, problem: Problem) -> dict[str, Tensor]:
    """The metric at each of the weights [n, 2], with what it is made of.

    Every point is a list entry of :func:`flatmin.ops.pacgen`, so one call does the whole surface. "pressure" is
    ``c_i N_i^2``: above 1, curvature limits the noise of a weight; below, the edge of the neighbourhood does.
    """
    hessian = hessians(w, problem)
    rho = lipschitz(w, hessian, problem)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    rhos = rho.unsqueeze(1).expand_as(w).contiguous()
    psi = ops.pacgen(list(w), list(diagonal.contiguous()), gamma=GAMMA, eps=EPS, lipschitz=list(rhos))[:, 0]
    n = neighbourhood(w)
    pressure = (diagonal + rhos * n).clamp(min=0.0) * n.square()
    return {"hessian": hessian, "lipschitz": rho, "psi": psi, "pressure": pressure}


def bound(loss_values: Any, psi: Any, eta: float) -> Any:
    """``L + (Psi + log(1 / delta)) / eta + eta / (2 n)``: loss and metric-based bound, for n points."""
    return loss_values + (psi + math.log(1.0 / DELTA)) / eta + eta / (2.0 * POINTS)


def best_eta(loss_values: Any, psi: Any) -> float:
    """The eta that makes the lowest point of the bound's surface lowest: ``sqrt(2 n (Psi + log(1 / delta)))`` at the
    point where the bound, at its own best eta, is lowest."""
    best = np.sqrt(2.0 * POINTS * (psi + math.log(1.0 / DELTA)))
    lowest = np.unravel_index(np.argmin(loss_values + best / POINTS), best.shape)
    return float(best[lowest])


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


# ---- figures ----

SHARP, FLAT = "#1a9850", "#d73027"  # green and red, as in the paper
CUT = 1.5  # nats above the sharp minimum at which the figures cut the loss: the minima differ by less than 0.1


def plot_surface(result: dict[str, Any], path: Path) -> None:
    """The loss in 3-D; on each minimum stands a bar as high as its PACGen."""
    s = result["surface"]
    sides = [np.linspace(axis[0], axis[-1], len(s["relief"])) for axis in (s["w1"], s["w2"])]
    w1, w2 = np.meshgrid(*sides, indexing="ij")
    z = np.log(np.array(s["relief"]))  # the minima differ by 0.1 nats, the hills by 10
    floor, top = z.min(), z.max()
    height = 0.75 * (top - floor) / max(result[name]["psi"] for name in ("sharp", "flat"))  # of a nat of PACGen
    with styled():
        fig = figure(9, 7.4)
        axes = fig.add_subplot(projection="3d", computed_zorder=False)
        axes.plot_surface(w1, w2, z, cmap="viridis", alpha=0.92, linewidth=0, rcount=FINE, ccount=FINE, zorder=1)
        for name, color in (("sharp", SHARP), ("flat", FLAT)):
            minimum = result[name]
            (a, b), bottom = minimum["w"], math.log(minimum["loss"])
            tip = bottom + height * minimum["psi"]
            axes.plot([a, a], [b, b], [bottom, tip], color=color, linewidth=8, solid_capstyle="butt", zorder=5)
            axes.scatter([a], [b], [bottom], color="white", edgecolor=color, s=50, linewidth=2, zorder=6)
            text = f"{name}\nPACGen {minimum['psi']:.2f}\nloss {minimum['loss']:.3f}"
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": color, "boxstyle": "round,pad=0.25"}
            axes.text(a, b, tip + 0.05 * (top - floor), text, color=color, ha="center", va="bottom", zorder=7,
                      fontsize=13, fontweight="bold", bbox=box)  # fmt: skip
        axes.set_xlabel("$w_1$", labelpad=8)
        axes.set_ylabel("$w_2$", labelpad=8)
        axes.set_zlabel("cross-entropy (nats, log scale)", labelpad=8)
        ticks = [t for t in (0.5, 1, 2, 4, 8, 16) if floor - 0.1 <= math.log(t) <= top]
        axes.set_zticks([math.log(t) for t in ticks], [f"{t:g}" for t in ticks])
        axes.set_title("Loss over the two free weights; height of the bars: PACGen", pad=0)
        axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
        axes.view_init(elev=42, azim=_azimuth(result))
        save(fig, path)


def _azimuth(result: dict[str, Any]) -> float:
    """Of the eye: the flat minimum in front, the sharp one behind it and to the side."""
    (a, b), (c, d) = (result[name]["w"] for name in ("sharp", "flat"))
    return math.degrees(math.atan2(d - b, c - a)) + 28.0


def plot_bound(result: dict[str, Any], path: Path) -> None:
    """Loss, PACGen and bound as maps over the two weights."""
    s = result["surface"]
    values, psi = np.array(s["loss"]), np.array(s["psi"])
    panels = (
        ("loss $L$ (nats)", values),
        ("PACGen $\\Psi$ (nats)", psi),
        (f"bound (nats), $\\eta$ = {result['eta']:.1f}", bound(values, psi, result["eta"])),
    )
    with styled():
        fig = figure(15, 4.9)
        fig.suptitle(r"Loss + metric-based bound: $L + (\Psi + \log 1/\delta)\,/\,\eta + \eta\,/\,2n$"
                     f" at its optimal $\\eta$, n = {POINTS}, $\\delta$ = {DELTA}")  # fmt: skip
        for axes, (name, z) in zip(fig.subplots(1, 3, sharey=True), panels, strict=True):
            low = z.min()
            high = min(z.max(), low + CUT) if z is not psi else np.quantile(z, 0.98)
            image = axes.contourf(
                s["w1"], s["w2"], z.T, levels=np.linspace(low, high, 25), cmap="viridis", extend="max"
            )
            for minimum, color, marker in (("sharp", SHARP, "^"), ("flat", FLAT, "s")):
                axes.plot(*result[minimum]["w"], marker, color=color, markeredgecolor="white", markersize=11,
                          label=f"{minimum} minimum")  # fmt: skip
            axes.set_title(name)
            axes.set_xlabel("$w_1$")
            axes.grid(False)
            fig.colorbar(image, ax=axes, format="%.2f", ticks=np.linspace(low, high, 6))
        axes = fig.axes[0]
        axes.set_ylabel("$w_2$")
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2)
        save(fig, path)


def plot_labels(result: dict[str, Any], path: Path) -> None:
    """True labels, and what the network makes of them at both minima."""
    maps, x, y = result["labels"], np.array(result["x"]), np.array(result["y"])
    titles = {"true": "true labels\ndensity above its median"}
    titles |= {
        name: f"predicted at the {name} minimum\n{result[name]['accuracy']:.0f} % of the points right"
        for name in ("sharp", "flat")
    }
    with styled():
        fig = figure(15, 5.2)
        for axes, (name, title) in zip(fig.subplots(1, 3, sharey=True), titles.items(), strict=True):
            z = np.array([list(map(int, row)) for row in maps[name]]).T
            axes.contourf(maps["x1"], maps["x2"], z, levels=[-0.5, 0.5, 1.5], colors=["#d1e5f0", "#fddbc7"])
            for label, color, marker in ((0, "#2166ac", "o"), (1, "#b2182b", "s")):
                axes.scatter(*x[y == label].T, color=color, marker=marker, s=26, edgecolor="white", linewidth=0.5,
                             label=f"label {label}")  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("$x_1$")
            axes.set_aspect("equal")
            axes.grid(False)
        fig.axes[0].set_ylabel("$x_2$")
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=2)
        save(fig, path)


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
