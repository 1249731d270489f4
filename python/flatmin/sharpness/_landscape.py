"""Loss and accuracy along lines and over planes through the weights."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_int, check_one_of
from .._distributed import agreed, is_first
from ..curvature._arguments import check_seed
from ..curvature._measurement import LossFn, Measurement, check_tensors, refuse_not_finite, shared_by
from ._directions import random_direction, spanned, towards
from ._landscape_result import Landscape
from ._passes import shift
from ._running_statistics import RunningStatistics
from ._scored import Scored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["line", "plane"]

_SAVE_EVERY = 1.0  # seconds between two writes of the file
Interval = tuple[float, float]


def line(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    to: Any = None,
    *,
    direction: Sequence[Tensor] | None = None,
    params: Iterable[Tensor] | None = None,
    points: int = 21,
    extent: Interval | None = None,
    batch_norm: str = "keep",
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> Landscape:
    """Loss and accuracy at ``w + a d``.

    Args:
        model, loss_fn, data, params, progress: see :mod:`flatmin.curvature`. The model is measured in the mode in which
            it is; call ``model.eval()`` first for BatchNorm's running statistics.
        to: another solution, ``d = to - w``: a ``state_dict()``, of which the parameters are read, or tensors like the
            parameters. The coordinate ``a`` is 0 at the weights and 1 there.
        direction: ``d``, tensors like the parameters, as an eigenvector. With neither, ``d`` is random and
            :func:`filter_normalised`.
        points: on the line, >= 2, at equal distances.
        extent: first and last ``a``; None for (-0.5, 1.5) with ``to`` and (-1, 1) without.
        batch_norm: "keep" leaves BatchNorm's running statistics as they are; "recompute" takes those of ``data`` at
            each point, with one more pass over it. Between two solutions only "recompute" is fair to both.
        path: a JSON file that is written on the way and continued from if it exists; ``ValueError`` if it holds another
            landscape. The data are not compared.
        seed: of a random direction.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of the data. The
            first rank reads and writes ``path``.
    """
    check_int("points", points, 2)
    check_seed(seed)
    if to is not None and direction is not None:
        raise ValueError("to and direction: both given; the line goes to a solution or along a direction")
    scored = Scored(loss_fn)
    model, process_group = shared_by(model, process_group)
    passes = _passes(points, batch_norm, _stored(path))
    with Measurement(model, scored, data, params, "landscape", passes, progress, process_group) as m:
        marks: dict[str, tuple[float, ...]] = {"weights": (0.0,)}
        if to is not None:
            d, label = towards(m, "to", to), "a, with weights w + a (w' - w)"
            marks["to"] = (1.0,)
        elif direction is not None:
            d, label = check_tensors("direction", direction, m.params), "a, with weights w + a d"
        else:
            d, label = random_direction(m, seed, 0), "a, with weights w + a d; d filter-normalised"
        refuse_not_finite("direction", d, [f"parameter {i}" for i in range(len(d))])
        axis = _axis("extent", extent or ((-0.5, 1.5) if to is not None else (-1.0, 1.0)), points)
        new = Landscape((axis,), (label,), [None] * points, marks, batch_norm, "")
        return _evaluated(m, scored, [d], new, path)


def plane(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    directions: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    *,
    solutions: tuple[Any, Any] | None = None,
    params: Iterable[Tensor] | None = None,
    points: int | tuple[int, int] = 21,
    extent: Interval | tuple[Interval, Interval] | None = None,
    batch_norm: str = "keep",
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> Landscape:
    """Loss and accuracy at ``w + a d_1 + b d_2``.

    Args:
        model, loss_fn, data, params, batch_norm, path, process_group, progress: as in :func:`line`.
        directions: ``d_1, d_2``, each tensors like the parameters, taken as they are: eigenvectors for instance. None:
            two random ones, :func:`filter_normalised` (Li et al. 2018, arXiv 1712.09913).
        solutions: two others, as ``to`` of :func:`line`: the plane through them and the weights, with orthonormal axes
            (Garipov et al. 2018, arXiv 1802.10026). Coordinates are distances of weights.
        points: along each axis, or along both, >= 2.
        extent: first and last coordinate, or those of each axis; None for (-1, 1), and for a fifth more than the three
            solutions span.
        seed: of random directions.
    """
    counts = (points, points) if isinstance(points, int) else tuple(points)
    if len(counts) != 2:
        raise ValueError(f"points: {points!r} given; give an integer, or two")
    for count in counts:
        check_int("points", count, 2)
    check_seed(seed)
    if directions is not None and solutions is not None:
        raise ValueError("directions and solutions: both given; a plane is spanned by one of them")
    for name, given in (("directions", directions), ("solutions", solutions)):
        if given is not None and len(given) != 2:
            raise ValueError(f"{name}: {len(given)} given; a plane takes two")
    scored = Scored(loss_fn)
    model, process_group = shared_by(model, process_group)
    passes = _passes(counts[0] * counts[1], batch_norm, _stored(path))
    with Measurement(model, scored, data, params, "landscape", passes, progress, process_group) as m:
        marks: dict[str, tuple[float, ...]] = {"weights": (0.0, 0.0)}
        limits: tuple[Interval, Interval] = ((-1.0, 1.0), (-1.0, 1.0))
        if solutions is not None:
            axes, where = spanned(m, solutions)
            marks |= {f"solution {i + 1}": at for i, at in enumerate(where)}
            limits = (_wider(0.0, where[0][0], where[1][0]), _wider(0.0, where[1][1]))
            labels = tuple(f"distance from the weights along axis {i + 1}" for i in range(2))
        elif directions is not None:
            axes = [check_tensors(f"directions[{i}]", d, m.params) for i, d in enumerate(directions)]
            labels = ("a, with weights w + a d1 + b d2", "b")
        else:
            axes = [random_direction(m, seed, draw) for draw in range(2)]
            labels = ("a, with weights w + a d1 + b d2", "b; d1, d2 filter-normalised")
        for i, d in enumerate(axes):
            refuse_not_finite(f"direction {i + 1}", d, [f"parameter {j}" for j in range(len(d))])
        if extent is not None:
            limits = extent if isinstance(extent[0], Sequence) else (extent, extent)
        grid = tuple(_axis("extent", limit, count) for limit, count in zip(limits, counts, strict=True))
        new = Landscape(grid, labels, [None] * (counts[0] * counts[1]), marks, batch_norm, "")
        return _evaluated(m, scored, axes, new, path)


def _wider(*at: float) -> Interval:
    margin = 0.2 * (max(at) - min(at))
    return min(at) - margin, max(at) + margin


def _axis(name: str, limits: Interval, points: int) -> tuple[float, ...]:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: {limits!r} given; give the first and the last coordinate, (-1.0, 1.0)")
    # so that 0 and 1 are met exactly where they are on the grid
    return tuple((low * (points - 1 - i) + high * i) / (points - 1) for i in range(points))


def _stored(path: str | os.PathLike[str] | None) -> Landscape | None:
    return None if path is None or not Path(path).exists() else Landscape.load(path)


def _passes(points: int, batch_norm: str, stored: Landscape | None) -> int:
    check_one_of("batch_norm", batch_norm, ("keep", "recompute"))
    done = 0 if stored is None else sum(v is not None for v in stored.values)
    return max(0, points - done) * (1 if batch_norm == "keep" else 2)


def _evaluated(m: Measurement, scored: Scored, axes: list[list[Tensor]], new: Landscape, path: Any) -> Landscape:
    """Every point of the grid that has no value yet, one pass each."""
    new.identity = _identity(m, axes)
    found = _continued(new, path, m.process_group)
    written = path if is_first(m.process_group) else None
    recompute = RunningStatistics(m) if found.batch_norm == "recompute" else None
    saved = time.monotonic()
    try:
        for i, at in enumerate(product(*found.axes)):
            if found.values[i] is not None:
                continue
            found.values[i] = _value(m, scored, axes, at, recompute)
            if written is not None and time.monotonic() - saved > _SAVE_EVERY:
                found.save(written)
                saved = time.monotonic()
    finally:
        if written is not None:
            found.save(written)
    return found


def _value(
    m: Measurement,
    scored: Scored,
    axes: list[list[Tensor]],
    at: tuple[float, ...],
    recompute: RunningStatistics | None,
) -> tuple[float, float | None]:
    with torch.no_grad():
        # one sum, so that 16-bit weights are rounded once
        offsets = [
            sum((a * d for a, d in zip(at[1:], rest, strict=True)), at[0] * first)
            for first, *rest in zip(*axes, strict=True)
        ]
    with m.moved(lambda part, backup: shift(part.of(m.params), part.of(offsets))):
        if recompute is None:
            loss = float(m.mean_loss())
            return loss, scored.take(m)
        loss = recompute.mean_loss(scored.forget)
        return loss, scored.take(m)


def _continued(new: Landscape, path: Any, group: ProcessGroup | None) -> Landscape:
    """What the first rank finds at ``path``, or the error that it meets there, on all of them."""
    if group is None:
        return _resumed(new, path)
    found: Any = None
    if is_first(group):
        try:
            found = _resumed(new, path).values
        except Exception as error:
            found = error
    found = agreed(found, group)
    if isinstance(found, Exception):
        raise found
    new.values = found
    return new


def _resumed(new: Landscape, path: Any) -> Landscape:
    stored = _stored(path)
    if stored is None:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"path: {os.fspath(path)} lies in no folder that exists; make the folder first")
        return new
    for what in ("axes", "labels", "batch_norm", "identity"):
        if getattr(stored, what) != getattr(new, what):
            name = {"identity": "weights or directions"}.get(what, what)
            raise ValueError(f"path: {os.fspath(path)} holds another landscape, of other {name}; give another path")
    return stored


def _identity(m: Measurement, axes: list[list[Tensor]]) -> str:
    digest = hashlib.sha256()
    for t in [*m.params, *(t for d in axes for t in d)]:
        local = t.detach().cpu().contiguous()
        digest.update(f"{local.dtype} {tuple(local.shape)}".encode())
        digest.update(ctypes.string_at(local.data_ptr(), local.numel() * local.element_size()))
    return digest.hexdigest()
