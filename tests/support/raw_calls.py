"""Random calls of the raw operators, good and spoiled, and what must hold after each: what `make fuzz` runs.

A call is a function of its seed. Its arguments are made from the schema; then none, one or a few of them are spoiled.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatmin.ops import _library
from raw_arguments import arguments
from spoiling import every, in_memory, spoil

__all__ = ["RawCall", "Verdict", "check", "describe"]

OPERATORS = sorted(_library.OPERATORS)


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
        self.given = arguments(rng, self.operator)
        self.spoiled = [spoil(rng, self.operator, self.given) for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 4)))]
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
        for t in every(value):
            if in_memory(t):
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
        for t in every(call.given[name]):
            if in_memory(t) and t.numel() > 0:
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
    tensors = [t for value in call.given.values() for t in every(value)]
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
