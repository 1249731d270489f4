"""Random calls of the raw operators, good and spoiled, and what must hold after each: what `make fuzz` runs.

A call is a function of its seed. Its arguments are made from the schema, by the makers of :mod:`flatmin._selftest` with
other shapes, strides and values; then none, one or a few of them are spoiled.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatmin import _selftest, reference
from flatmin.ops import _library
from problems import LAYOUTS

__all__ = ["RawCall", "Verdict", "check", "describe"]

OPERATORS = sorted(_library.OPERATORS)

_POOL_LENGTH = 1 << 18
_LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 129)
_LONG = (1023, 1025, 4095, 4097, 70_001)

#: Every value that a scalar tensor may have without being refused; and what a number of an argument is replaced by.
_SCALARS = (0.0, -0.0, 0.5, 1.0, 1e300, 5e-324, math.inf, math.nan)
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


def _pool(dtype: torch.dtype) -> Tensor:
    """Numbers to take values from: mostly ordinary, some zeros, infinities, NaNs, subnormal and huge ones."""
    generator = torch.Generator().manual_seed(20)
    if not dtype.is_floating_point:
        return torch.randint(0, 256, (_POOL_LENGTH,), generator=generator).to(dtype)
    values = torch.randn(_POOL_LENGTH, generator=generator, dtype=torch.float64)
    info = torch.finfo(dtype)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny / 2, info.eps])
    where = torch.randint(0, _POOL_LENGTH, (_POOL_LENGTH // 50,), generator=generator)
    values[where] = odd.double()[torch.randint(0, len(odd), where.shape, generator=generator)]
    return values.to(dtype)


_POOLS = {dtype: _pool(dtype) for dtype in (*_selftest.DTYPES, torch.uint8)}


def _from_pool(rng: random.Random, count: int, dtype: torch.dtype) -> Tensor:
    """In memory of exactly this size, beyond which AddressSanitizer sees every access."""
    if count >= _POOL_LENGTH:
        return _POOLS[dtype].repeat(count // _POOL_LENGTH + 1)[:count].clone()
    start = rng.randrange(_POOL_LENGTH - count)
    return _POOLS[dtype][start : start + count].clone()


@dataclass
class _Drawn(_selftest.Case):
    """The arguments of one call, before anything is spoiled."""

    def values(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return _from_pool(self.rng, math.prod(shape), dtype).view(shape)

    def laid_out(self, t: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            return t
        return LAYOUTS[self.rng.choice(sorted(LAYOUTS))](t.shape, t.dtype).copy_(t)


def _shape(rng: random.Random) -> tuple[int, ...]:
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
    return _from_pool(case.rng, reference.backup_nbytes(case.made["params"]), torch.uint8)


def _wide_numbers(count: int) -> Callable[[_selftest.Case], Tensor]:
    return lambda case: _from_pool(case.rng, count, torch.float64)


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
        given["key"] = torch.tensor([[rng.randrange(2**63), rng.randrange(2**40), rng.randrange(9)]] * count).view(
            -1, 3
        )
        given["key"] = given["key"].to(torch.int64).view(torch.uint64)


# ---- spoiling ----


def _numbers(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    return _from_pool(rng, math.prod(shape), rng.choice(_selftest.DTYPES)).view(shape)


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
    "other": lambda rng, t: _numbers(rng, _shape(rng)),
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


def _every(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        yield from value


def _alias(rng: random.Random, t: Tensor, given: dict[str, Any]) -> Tensor:
    """A view, of any floating type and strides, of memory that another tensor of the call has."""
    others = [other for value in given.values() for other in _every(value) if _in_memory(other)]
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


def _in_memory(t: Tensor) -> bool:
    """Whether there are bytes to look at."""
    if t.layout != torch.strided or t.device.type != "cpu" or t._is_zerotensor():
        return False
    return t.untyped_storage().nbytes() > 0


def _spoil_list(rng: random.Random, given: dict[str, Any], name: str) -> str:
    values = given[name]
    kind = rng.choice(("empty", "shorter", "longer", "twice", "swapped", "shuffled", "another"))
    if kind == "empty" or not values:
        given[name] = [] if values else [_numbers(rng, _shape(rng))]
    elif kind == "shorter":
        given[name] = values[:-1]
    elif kind == "longer":
        given[name] = [*values, _numbers(rng, _shape(rng))]
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


def _spoil(rng: random.Random, operator: str, given: dict[str, Any]) -> str:
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
    if t.numel() > _POOL_LENGTH or (t.layout == torch.strided and t.numel() > 0 and not _in_memory(t)):
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


# ---- calls ----


@dataclass
class RawCall:
    """One call of one operator: a function of ``seed``."""

    seed: int
    operator: str = field(init=False)
    given: dict[str, Any] = field(init=False)
    spoiled: list[str] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.operator = rng.choice(OPERATORS)
        case = _Drawn(
            self.operator, rng.choice(_selftest.DTYPES), rng, [_shape(rng) for _ in range(_number_of_tensors(rng))]
        )
        schema = _library.OPERATORS[self.operator]._schema
        names = _library.ARGUMENTS[self.operator]
        self.given = dict(zip(names, _selftest.arguments_of(case, schema, _MAKERS), strict=True))
        if self.operator in _library._SAMPLES:
            _vary_labels(rng, self.given)
        if self.operator == "scaled_noise_":
            _vary_noise(rng, self.given)
        self.spoiled = [_spoil(rng, self.operator, self.given) for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 4)))]
        if rng.random() < 0.02:
            self.spoiled.append("everything: meta")
            for name, value in self.given.items():
                if isinstance(value, list) and name not in _library._ON_THE_HOST:
                    self.given[name] = [t.to("meta") for t in value]
                elif isinstance(value, Tensor):
                    self.given[name] = value.to("meta")

    def run(self) -> Any:
        return _library.OPERATORS[self.operator](*self.given.values())


@dataclass
class Verdict:
    """What became of a call: whether it was refused, with which words, and what is wrong with that."""

    refusal: str | None = None
    fault: str | None = None


def describe(call: RawCall) -> str:
    """The call on a few lines, for a report."""

    def one(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(one, value)) + "]"
        if not isinstance(value, Tensor):
            return repr(value)
        strides = f" by {tuple(value.stride())}" if value.layout == torch.strided else f" {value.layout}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{strides} on {value.device}"

    lines = [f"{call.operator}, seed {call.seed}; spoiled: {', '.join(call.spoiled) or 'nothing'}"]
    return "\n".join(lines + [f"  {name} = {one(value)}" for name, value in call.given.items()])


def _bytes(call: RawCall) -> dict[int, tuple[int, bytes]]:
    """Everything that the call's tensors can reach, by address."""
    found: dict[int, tuple[int, bytes]] = {}
    for value in call.given.values():
        for t in _every(value):
            if _in_memory(t):
                storage = t.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if address not in found:
                    found[address] = size, ctypes.string_at(address, size)
    return found


def _elements(t: Tensor) -> Iterator[int]:
    """Addresses of the elements of a small tensor."""
    offsets = [0]
    for n, stride in zip(t.shape, t.stride(), strict=True):
        offsets = [base + i * stride for base in offsets for i in range(n)]
    return (t.data_ptr() + t.element_size() * offset for offset in offsets)


def _may_be_written(call: RawCall) -> set[int]:
    """Every byte that the schema lets the operator write to."""
    allowed: set[int] = set()
    for name in _library.WRITTEN[call.operator]:
        for t in _every(call.given[name]):
            if _in_memory(t) and t.numel() > 0:
                size = t.element_size()
                for at in _elements(t):
                    allowed.update(range(at, at + size))
    return allowed


def _strays(call: RawCall, before: dict[int, tuple[int, bytes]]) -> str | None:
    """A byte that an accepted call changed although the schema does not let it."""
    changed = []
    for address, (size, old) in before.items():
        new = ctypes.string_at(address, size)
        if new != old:
            changed += [address + i for i in range(size) if new[i] != old[i]]
    if not changed:
        return None
    strays = set(changed) - _may_be_written(call)
    return f"{len(strays)} bytes changed that are no element of a written argument" if strays else None


_SMALL = 4096


def check(call: RawCall) -> Verdict:
    """Run ``call``. A fault is a good call that is refused, a refused one that wrote, a byte written outside of what
    the schema says, or a tensor that the operator keeps hold of."""
    before = _bytes(call)
    tensors = [t for value in call.given.values() for t in _every(value)]
    counts = [t._use_count() for t in tensors]  # type: ignore[attr-defined]
    try:
        result = call.run()
    except Exception as error:
        verdict = Verdict(refusal=f"{type(error).__name__}: {error}")
        if not call.spoiled:
            verdict.fault = f"a good call was refused: {verdict.refusal}"
        elif any(ctypes.string_at(at, size) != old for at, (size, old) in before.items()):
            verdict.fault = f"the call was refused, but it had written: {verdict.refusal}"
        del error
    else:
        verdict = Verdict()
        if sum(size for size, _ in before.values()) <= _SMALL:
            verdict.fault = _strays(call, before)
        del result
    if verdict.fault is None and [t._use_count() for t in tensors] != counts:  # type: ignore[attr-defined]
        verdict.fault = "the operator keeps hold of a tensor after the call"
    return verdict


def operators_of(calls: Counter[str]) -> str:
    """How often each was called."""
    return ", ".join(f"{name} {count}" for name, count in sorted(calls.items()))
