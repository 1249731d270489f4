"""What makes an argument of a raw operator a bad one: other types, sizes, strides and memory, numbers out of range."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flatmin import _selftest
from flatmin.ops import _library
from raw_arguments import POOL_LENGTH, from_pool, random_shape

__all__ = ["every", "in_memory", "spoil"]

#: What a number of an argument is replaced by.
_WILD = (-1.0, -1e-300, 2.0, 1e308, math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.0)
_WILD_INTEGERS = (-1, 0, 1, 2, 3, 4, 7, 255, 2**31 - 1, 2**31, 2**32, 2**45, 2**50, 2**62, 2**63 - 1, -(2**63))

#: Of a result: few elements, or more than any machine has memory for.
_WILD_COUNTS = (-1, 0, 1, 2, 7, 255, 2**45, 2**50, 2**62, 2**63 - 1, -(2**63))

_TYPES = (
    *_selftest.DTYPES,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.uint64,
    torch.float8_e4m3fn,
)


def _numbers(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    return from_pool(rng, math.prod(shape), rng.choice(_selftest.DTYPES)).view(shape)


def _overlapping(rng: random.Random, t: Tensor) -> Tensor:
    strides = [rng.choice((0, 1, 1, 2, 3)) for _ in t.shape]
    reach = 1 + sum(max(n - 1, 0) * s for n, s in zip(t.shape, strides, strict=True))
    return t.new_zeros(reach).as_strided(t.shape, strides)


def _reshaped(rng: random.Random, t: Tensor) -> Tensor:
    n = t.numel()
    shapes: list[tuple[int, ...]] = [(n,), (n, 1), (1, n), (n, 1, 1), (-1,)]
    shapes += [(n // k, k) for k in (2, 3, 5) if n and n % k == 0]
    return t.reshape(rng.choice(shapes))


def _resized(rng: random.Random, t: Tensor) -> Tensor:
    n = max(0, t.numel() + rng.choice((-64, -3, -1, 1, 2, 64)))
    return t.new_zeros(n)


def _misaligned(rng: random.Random, t: Tensor) -> Tensor:
    if t.dtype in (torch.bool, torch.int8, torch.uint8) or t.numel() == 0:
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    held = bytearray(t.numel() * t.element_size() + t.element_size())
    return torch.frombuffer(held, dtype=t.dtype, count=t.numel(), offset=rng.randrange(1, t.element_size())).view(
        t.shape
    )


def _freed(rng: random.Random, t: Tensor) -> Tensor:
    """Without memory, as FSDP leaves a parameter that it has given back."""
    own = t.clone()
    own.untyped_storage().resize_(0)
    return own


def _empty(rng: random.Random, t: Tensor) -> Tensor:
    """No elements, in sizes and strides that no memory could have."""
    shape, strides = rng.choice(
        (
            ((0, 2**40, 3), (1, 2**61, 7)),
            ((2**40, 0), (2**62, 1)),
            ((0,), (2**62,)),
            ((3, 0, 2**58), (2**62, 2**62, 2**62)),
            ((2**57, 0), (1, 1)),
            ((2**61, 4, 0), (4, 1, 1)),
        )
    )
    return t.new_empty(0).as_strided(shape, strides)


def _huge(rng: random.Random, t: Tensor) -> Tensor:
    return t.new_zeros(()).expand(rng.choice(((2**40,), (2**30, 2**30), (2**61,), (2**62,), (2**57, 32))))


def _many_dimensions(rng: random.Random, t: Tensor) -> Tensor:
    dims = rng.choice((15, 16, 17, 40))
    shape = rng.choice(((1,) * dims, (2, *(1,) * dims), (*(1,) * (dims - 4), 2, 2, 2, 2), (*(2,) * dims, 0)))
    return t.new_zeros(shape)


def _zero_tensor(rng: random.Random, t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)  # type: ignore[attr-defined]


_ELEMENTS: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "type": lambda rng, t: t.to(rng.choice(_TYPES)),
    "type again": lambda rng, t: t.to(rng.choice(_selftest.DTYPES)),
    "meta": lambda rng, t: t.to("meta"),
    "sparse": lambda rng, t: t.to_sparse(),
    "csr": lambda rng, t: t.to_sparse_csr(),
    "expanded": lambda rng, t: t.new_zeros(()).expand(t.shape),
    "overlapping": _overlapping,
    "reshaped": _reshaped,
    "resized": _resized,
    "other": lambda rng, t: _numbers(rng, random_shape(rng)),
    "transposed": lambda rng, t: t.permute([*reversed(range(t.dim()))]),
    "misaligned": _misaligned,
    "freed": _freed,
    "empty": _empty,
    "huge": _huge,
    "many dimensions": _many_dimensions,
    "leaf": lambda rng, t: t.detach().requires_grad_(),
    "parameter": lambda rng, t: torch.nn.Parameter(t, requires_grad=False),
    "negative": lambda rng, t: torch._neg_view(t) if t.is_floating_point() else t,
    "zero": _zero_tensor,
}


def every(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        yield from value


def _alias(rng: random.Random, t: Tensor, given: dict[str, Any]) -> Tensor:
    """A view, of any floating type and strides, of memory that another tensor of the call has."""
    others = [other for value in given.values() for other in every(value) if in_memory(other)]
    if not others:
        return t
    storage = rng.choice(others).untyped_storage()
    dtype = rng.choice((t.dtype, t.dtype, *_selftest.DTYPES))
    if dtype.is_complex or storage.nbytes() < 64:
        return t
    room = storage.nbytes() // dtype.itemsize
    shape = t.shape if rng.random() < 0.7 else (rng.randrange(1, 8),)
    step = rng.choice((1, 1, 2, 3, 4))
    strides = [0] * len(shape)
    for d in reversed(range(len(shape))):
        strides[d], step = step, step * max(shape[d], 1)
    reach = 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    if reach > room:
        return t
    return torch.empty(0, dtype=dtype).set_(storage, rng.randrange(room - reach + 1), shape, strides)


def in_memory(t: Tensor) -> bool:
    """Whether there are bytes to look at."""
    if t.layout != torch.strided or t.device.type != "cpu" or t._is_zerotensor():
        return False
    return t.untyped_storage().nbytes() > 0


def _spoil_list(rng: random.Random, given: dict[str, Any], name: str) -> str:
    values = given[name]
    kind = rng.choice(("empty", "shorter", "longer", "twice", "swapped", "shuffled", "another"))
    if kind == "empty" or not values:
        given[name] = [] if values else [_numbers(rng, random_shape(rng))]
    elif kind == "shorter":
        given[name] = values[:-1]
    elif kind == "longer":
        given[name] = [*values, _numbers(rng, random_shape(rng))]
    elif kind == "twice":
        given[name] = [*values[:-1], values[0]]
    elif kind == "swapped":
        i = rng.randrange(len(values))
        values[i], values[0] = values[0], values[i]
    elif kind == "shuffled":
        rng.shuffle(values)
    else:
        given[name] = rng.choice([v for v in given.values() if isinstance(v, list)])
    return kind


def spoil(rng: random.Random, operator: str, given: dict[str, Any]) -> str:
    """Change one argument in place of ``given``; returns what was done to which."""
    name = rng.choice(list(given))
    value = given[name]
    if isinstance(value, bool):
        given[name] = not value
        return f"{name}: inverted"
    if isinstance(value, float):
        given[name] = rng.choice(_WILD)
        return f"{name}: {given[name]}"
    if isinstance(value, int):
        given[name] = rng.choice(_WILD_COUNTS if name in ("count", "inner") else _WILD_INTEGERS)
        return f"{name}: {given[name]}"
    if isinstance(value, list) and (not value or rng.random() < 0.3):
        return f"{name}: {_spoil_list(rng, given, name)}"
    at = rng.randrange(len(value)) if isinstance(value, list) else None
    t = value if at is None else value[at]
    where = name if at is None else f"{name}[{at}]"
    kind = rng.choice((*_ELEMENTS, "alias", "alias"))
    if kind == "huge" and not _library.WRITTEN[operator]:
        kind = "expanded"  # a reduction would have to read them all
    if t.numel() > POOL_LENGTH or (t.layout == torch.strided and t.numel() > 0 and not in_memory(t)):
        return f"{where}: left"  # torch would copy all of it, or read where nothing is
    try:
        made = _alias(rng, t, given) if kind == "alias" else _ELEMENTS[kind](rng, t)
    except Exception:  # torch itself has no such tensor
        return f"{where}: left ({kind})"
    if at is None:
        given[name] = made
    else:
        given[name] = [*value[:at], made, *value[at + 1 :]]
    return f"{where}: {kind}"
