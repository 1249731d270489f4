"""The figures of toy_surface.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from _toy_problem import DELTA, FINE, POINTS, bound

from _common.figures import figure, save, styled

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
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        save(fig, path)
