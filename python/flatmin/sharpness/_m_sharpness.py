"""m-sharpness: how far the loss of a few samples can rise within a radius of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of, check_size
from .._distributed import gathered
from ..curvature._arguments import check_seed
from ..curvature._measurement import LossFn, Measurement, shared_by
from ._ball import ADAPTIVE, Ball
from ._passes import check_p, groups, loss_and_gradient, loss_of, replayed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MSharpness", "m_sharpness", "mean_over_groups"]


class MSharpness(NamedTuple):
    """What :func:`m_sharpness` found, in units of the loss.

    Attributes:
        value: mean over the groups of the largest rise of their loss that was found, each group weighted by its size.
        stderr: standard error of ``value`` over the groups; NaN from one group.
        per_group: the rise of each group, in the order of the data.
        sizes: number of samples of each group.
    """

    value: float
    stderr: float
    per_group: tuple[float, ...]
    sizes: tuple[int, ...]


def m_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    rho: float,
    m: int | None = None,
    *,
    params: Iterable[Tensor] | None = None,
    p: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.01,
    steps: int = 1,
    restarts: int = 1,
    max_groups: int | None = None,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> MSharpness:
    """Mean over disjoint groups s of m samples of ``max_{||e|| <= rho} L_s(w + e) - L_s(w)`` (Foret et al. 2020, arXiv
    2010.01412, section 4.2; it follows the generalisation gap better for small m).

    The maximum is taken over the points tried, ``w`` among them: it is a lower bound of the true one, and never
    negative. With the defaults the point is that of SAM's step. A step of ``steps`` > 1 follows the normalised gradient
    from the best point so far and is projected on the ball; its length is rho at first and halves whenever the loss did
    not rise, so that more steps never find less.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`.
        rho: radius >= 0.
        m: samples in a group. Groups are taken in the order of the data: batches are split, or counted together, as
            needed. The last group may be smaller; it counts by its size. None: all the data are one group.
        p: norm of the radius, 2 or ``float("inf")``.
        adaptive: measure ``e`` in units of the weights, ``||e / T||_p <= rho``. True or "davda54": ``T = |w|``, which
            does not change when a ReLU layer is multiplied by a factor and the next one divided by it; a weight of 0
            does not move. "asam": SAM's ``adaptive=True``, ``T = |w| + eta`` for tensors of two or more dimensions and
            1 for the others (Kwon et al. 2021, arXiv 2102.11600), which such a factor changes a little.
        eta: of "asam".
        steps: gradients along one ascent, >= 1.
        restarts: ascents, >= 1; the first is from ``w``, the others from random points in the ball. A minimum to the
            last digit has no gradient to follow: there it takes ``restarts`` > 1.
        max_groups: measure the first groups only; None for all.
        seed: of the random points.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of the data. No group
            of samples spans two ranks, so that the last one of each may be smaller; they are listed in the order of the
            ranks, which share ``max_groups`` evenly, rounded up. With ``m=None`` all samples of all ranks are one.

    Returns:
        ``(value, stderr, per_group, sizes)``. A group whose loss or gradient is not finite has the value NaN or
        infinity, and so has the mean.
    """
    check_size("rho", rho)
    check_p(p)
    check_one_of("adaptive", adaptive, tuple(ADAPTIVE))
    check_size("eta", eta)
    check_int("steps", steps, 1)
    check_int("restarts", restarts, 1)
    check_seed(seed)
    for name, count in (("m", m), ("max_groups", max_groups)):
        if count is not None:
            check_int(name, count, 1)
    passes = 1 if m is not None else restarts * (steps + 1)
    model, process_group = shared_by(model, process_group)
    if process_group is not None and max_groups is not None:
        max_groups = math.ceil(max_groups / torch.distributed.get_world_size(process_group))
    together = process_group if m is None else None  # else a rank's groups are its own until the end
    with Measurement(model, loss_fn, data, params, "m-sharpness", passes, progress, together) as meter:
        ball = Ball(meter, float(rho), p, adaptive, eta)
        rises: list[float] = []
        sizes: list[int] = []
        if m is None:
            rises.append(_rise(meter, ball, meter.batches, steps, restarts, seed, 0))
            sizes.append(int(meter.summed(meter.count)[0]))
        else:
            before = _groups_before(meter, m, max_groups, process_group) if restarts > 1 else 0
            for pieces in groups(meter, m):
                draw = restarts * (before + len(rises))
                rises.append(_rise(meter, ball, replayed(meter, pieces), steps, restarts, seed, draw))
                sizes.append(sum(size for _, _, size in pieces))
                if len(rises) == max_groups:
                    break
            everywhere = gathered((rises, sizes), process_group)
            rises, sizes = ([x for found in everywhere for x in found[i]] for i in range(2))
        value, stderr = mean_over_groups(rises, sizes)
        return MSharpness(value, stderr, tuple(rises), tuple(sizes))


def _groups_before(m: Measurement, size: int, most: int | None, process_group: ProcessGroup | None) -> int:
    """How many groups of samples the ranks before this one have: each has random points of its own."""
    if process_group is None:
        return 0
    own = math.ceil(sum(count for _, _, count in m.batches()) / size)
    counts: list[int] = gathered(own if most is None else min(own, most), process_group)
    return sum(counts[: torch.distributed.get_rank(process_group)])


def _rise(m: Measurement, ball: Ball, samples: Any, steps: int, restarts: int, seed: int, draw: int) -> float:
    """The largest rise of the loss of one group. ``samples()`` starts a pass over it."""
    clean, slope = loss_and_gradient(m, samples())
    if not math.isfinite(clean) or not math.isfinite(m.norm(slope)):
        return math.nan
    found = [_ascend(m, ball, samples, None, clean, slope, steps)]
    for restart in range(1, restarts):
        start = ball.random(seed, draw + restart)
        with m.moved(ball.to(start)):
            loss, there = loss_and_gradient(m, samples())
        found.append(_ascend(m, ball, samples, start, loss, there, steps))
    if any(map(math.isnan, found)):
        return math.nan
    return max(0.0, max(found) - clean)


def _ascend(
    m: Measurement,
    ball: Ball,
    samples: Any,
    start: list[Tensor] | None,
    loss: float,
    gradient: Sequence[Tensor],
    steps: int,
) -> float:
    """The largest loss on the way up from ``start`` (None: ``w``), whose loss and gradient are given."""
    point, best, slope, length = start, loss, gradient, ball.rho
    for step in range(steps):
        last = step + 1 == steps
        # SAM's own step where it is the only one: it needs no copy of the weights' size
        alone = steps == 1 and point is None
        new = None if alone else ball.step(point, slope, length)
        move = ball.sam(slope) if alone else None if new is None else ball.to(new)
        if move is None:
            break
        with m.moved(move):
            reached, there = (loss_of(m, samples()), slope) if last else loss_and_gradient(m, samples())
        if math.isnan(reached):
            return reached
        if reached > best:
            point, best, slope = new, reached, there
        else:
            length *= 0.5
    return best


def mean_over_groups(values: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Mean by size and its standard error, which for equal sizes is the usual one."""
    total = sum(sizes)
    shares = [size / total for size in sizes]
    mean = sum(share * value for share, value in zip(shares, values, strict=True))
    if len(values) == 1 or not math.isfinite(mean):
        return mean, math.nan
    squares = math.fsum(share**2 for share in shares)
    variance = math.fsum(s * (v - mean) ** 2 for s, v in zip(shares, values, strict=True)) / (1.0 - squares)
    return mean, math.sqrt(variance * squares)
