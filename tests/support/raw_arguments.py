"""Arguments that a raw operator must take, made from its schema by a seed: other shapes, strides and values than those
of :mod:`flatmin._selftest`, by whose makers they are made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin import _selftest, reference
from flatmin.ops import _library
from problems import LAYOUTS

__all__ = ["POOL_LENGTH", "arguments", "from_pool", "random_shape"]

POOL_LENGTH = 1 << 18
_LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 129)
_LONG = (1023, 1025, 4095, 4097, 70_001)

#: Every value that a scalar tensor may have without being refused.
_SCALARS = (0.0, -0.0, 0.5, 1.0, 1e300, 5e-324, math.inf, math.nan)


def _pool(dtype: torch.dtype) -> Tensor:
    """Numbers to take values from: mostly ordinary, some zeros, infinities, NaNs, subnormal and huge ones."""
    generator = torch.Generator().manual_seed(20)
    if not dtype.is_floating_point:
        return torch.randint(0, 256, (POOL_LENGTH,), generator=generator).to(dtype)
    values = torch.randn(POOL_LENGTH, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny / 2, info.eps])
    where = torch.randint(0, POOL_LENGTH, (POOL_LENGTH // 50,), generator=generator)
    values[where] = odd.double()[torch.randint(0, len(odd), where.shape, generator=generator)]
    return values.to(dtype)


_POOLS = {dtype: _pool(dtype) for dtype in (*_selftest.DTYPES, torch.uint8)}


def from_pool(rng: random.Random, count: int, dtype: torch.dtype) -> Tensor:
    """In memory of exactly this size, beyond which AddressSanitizer sees every access."""
    if count >= POOL_LENGTH:
        return _POOLS[dtype].repeat(count // POOL_LENGTH + 1)[:count].clone()
    start = rng.randrange(POOL_LENGTH - count)
    return _POOLS[dtype][start : start + count].clone()


@dataclass
class _Drawn(_selftest.Case):
    """The arguments of one call, before anything is spoiled."""

    def values(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return from_pool(self.rng, math.prod(shape), dtype).view(shape)

    def laid_out(self, t: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            return t
        return LAYOUTS[self.rng.choice(sorted(LAYOUTS))](t.shape, t.dtype).copy_(t)


def random_shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.4:
        return (rng.choice(_LENGTHS),)
    if kind < 0.7:
        return rng.randrange(1, 9), rng.randrange(1, 40)
    if kind < 0.85:
        return rng.randrange(0, 4), rng.randrange(1, 4), rng.randrange(1, 6), rng.randrange(1, 6)
    if kind < 0.99:
        return rng.choice(((), (1, 1), (3, 0, 2), (2, 1, 3, 1, 2)))
    return (rng.choice(_LONG),)


def _number_of_tensors(rng: random.Random) -> int:
    return rng.choice((1, 1, 2, 2, 3, 4, 5, 40 if rng.random() < 0.05 else 6))


def _scalar(case: _selftest.Case) -> Tensor:
    return torch.tensor(case.rng.choice(_SCALARS), dtype=torch.float64)


def _backup(case: _selftest.Case) -> Tensor:
    return from_pool(case.rng, reference.backup_nbytes(case.made["params"]), torch.uint8)


def _wide_numbers(count: int) -> Callable[[_selftest.Case], Tensor]:
    return lambda case: from_pool(case.rng, count, torch.float64)


def _sizes(rng: random.Random, count: int) -> Tensor:
    """What may not be negative."""
    return torch.tensor([rng.choice((0.0, 1e-30, 1.0, 1e30)) * rng.random() for _ in range(count)], dtype=torch.float64)


def _one_or_own(width: int) -> Callable[[_selftest.Case], Tensor]:
    """One number for all tensors, or so many for each."""

    def make(case: _selftest.Case) -> Tensor:
        if case.rng.random() < 0.5:
            return _scalar(case)
        return _sizes(case.rng, width * len(case.shapes))

    return make


def _steps(case: _selftest.Case) -> list[Tensor]:
    kind = case.rng.choice((torch.float32, torch.float64))
    return [torch.tensor(float(case.rng.choice((0, 1, 7, 10**6))), dtype=kind) for _ in case.shapes]


#: Where the self-test's own makers are slow, or always give the same.
_MAKERS: dict[str, Callable[[Any], Tensor | list[Tensor]]] = _selftest.TENSORS | {
    "backup": _backup,
    "coefficients": _wide_numbers(3),
    "corrections": _wide_numbers(2),
    "norm": _scalar,
    "lr": _one_or_own(2),
    "rho": _one_or_own(1),
    "scale": _scalar,
    "curvature_scale": _scalar,
    "lipschitz_constant": _scalar,
    "steps": _steps,
}


def _vary_labels(rng: random.Random, given: dict[str, Any]) -> None:
    """Operators on labels: other sizes, a table of targets, an index or none."""
    rows, columns = rng.randrange(0, 70), rng.choice((1, 2, 5, 70))
    index = torch.tensor([rng.randrange(2**40) for _ in range(rows)], dtype=torch.int64)
    given["index"] = index if rng.random() < 0.5 else index[:0].clone()
    if "count" in given:
        given["count"], given["inner"] = rows, columns
        return
    classes = given["classes"] = rng.choice((1, 2, 10, 1000, 2**31 - 1))
    labels = [rng.choice((-100, rng.randrange(classes))) for _ in range(rows * columns)]
    given["labels"] = torch.tensor(labels, dtype=torch.int64).view(rows, columns)
    given["out"] = torch.full_like(given["labels"], -7)
    given["span"] = rng.randrange(1, min(classes, 1000) + 1)
    given["offset"] = rng.randrange(0, classes + 2 - given["span"])
    if classes <= 10 and rng.random() < 0.5:
        slots = rng.randrange(1, 5)
        wide = [rng.choice((0, 1, 2**31, 2**32, 2**63 - 1, -1)) for _ in range(classes * slots)]
        given["bounds"] = torch.tensor(wide, dtype=torch.int64).view(classes, slots)
        given["targets"] = torch.tensor([rng.randrange(classes) for _ in wide], dtype=torch.int64)


def _vary_noise(rng: random.Random, given: dict[str, Any]) -> None:
    """Sizes and keys of their own."""
    count = len(given["params"])
    if rng.random() < 0.3:
        given["scale"] = _sizes(rng, 3 * count)
    if rng.random() < 0.3:
        words = [(rng.randrange(2**63), rng.randrange(2**40), rng.randrange(9)) for _ in range(count)]
        given["key"] = torch.tensor(words, dtype=torch.int64).view(count, 3).view(torch.uint64)


def arguments(rng: random.Random, operator: str) -> dict[str, Any]:
    """By name, in the order of the schema."""
    case = _Drawn(
        operator, rng.choice(_selftest.DTYPES), rng, [random_shape(rng) for _ in range(_number_of_tensors(rng))]
    )
    schema = _library.OPERATORS[operator]._schema
    given = dict(zip(_library.ARGUMENTS[operator], _selftest.arguments_of(case, schema, _MAKERS), strict=True))
    if operator in _library._SAMPLES:
        _vary_labels(rng, given)
    if operator == "scaled_noise_":
        _vary_noise(rng, given)
    return given
