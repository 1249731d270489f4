"""What a batch is made of: its tensors, its size, and the same batch on another device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._devices import on_device

__all__ = ["fingerprint", "first_dimensions", "same_prints", "to_device"]

_COMPARED = 1 << 16  # elements of a tensor: some of every sample


def to_device(x: Any, device: torch.device) -> Any:
    """``x`` with its tensors on ``device``, in containers of the same types; the same object where nothing moves.

    Objects with a ``to`` method are moved by it: a copy of them, since some move themselves.
    """
    if isinstance(x, Tensor):
        return x if x.device == device else on_device(x, device)
    if isinstance(x, PackedSequence):
        return x if x.data.device == device else x.to(device)  # type: ignore[arg-type]
    if isinstance(x, Mapping):
        return _map_items(x, device)
    if isinstance(x, list | tuple):
        items = [to_device(item, device) for item in x]
        return x if _same(items, x) else _sequence_like(x, items)
    if callable(getattr(x, "to", None)) and not isinstance(x, type):
        own = copy.copy(x)
        moved = own.to(device)
        return own if moved is None else moved
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _map_fields(x, device)
    return x


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _map_items(x: Mapping[Any, Any], device: torch.device) -> Any:
    items = {key: to_device(value, device) for key, value in x.items()}
    if _same(items.values(), x.values()):
        return x
    if type(x) is dict:
        return items
    try:
        own: Any = copy.copy(x)
        for key, value in items.items():
            own[key] = value
    except TypeError:  # it cannot be written to: MappingProxyType and its like
        return items
    return own


def _sequence_like(x: Any, items: list[Any]) -> Any:
    if hasattr(x, "_fields"):  # a named tuple takes its items one by one
        return type(x)(*items)
    if type(x) in (list, tuple) or isinstance(x, tuple):
        return type(x)(items)
    own = copy.copy(x)
    own[:] = items
    return own


def _map_fields(x: Any, device: torch.device) -> Any:
    names = [field.name for field in dataclasses.fields(x)]
    items = [to_device(getattr(x, name), device) for name in names]
    if _same(items, (getattr(x, name) for name in names)):
        return x
    own = copy.copy(x)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(own, name, item)  # frozen ones too: the copy is ours
    return own


def _leaves(x: Any, seen: set[int]) -> Iterator[Any]:
    """Tensors, packed sequences and plain values in ``x``, in order."""
    if isinstance(x, Tensor | PackedSequence | str | bytes):
        yield x
        return
    if isinstance(x, Mapping):
        inner = list(x.values())
    elif isinstance(x, list | tuple):
        inner = list(x)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        inner = [getattr(x, field.name) for field in dataclasses.fields(x)]
    elif callable(getattr(x, "to", None)) and not isinstance(x, type):
        inner = list(getattr(x, "__dict__", {}).values())
    else:
        yield x
        return
    if id(x) not in seen:  # objects may hold each other
        seen.add(id(x))
        for item in inner:
            yield from _leaves(item, seen)


def first_dimensions(batch: Any) -> dict[int, str]:
    """The sizes of the first dimensions of the tensors in ``batch``, each with the shape of one that has it."""
    sizes: dict[int, str] = {}
    for x in _leaves(batch, set()):
        if isinstance(x, PackedSequence):
            sizes.setdefault(int(x.batch_sizes[0]) if len(x.batch_sizes) else 0, "a PackedSequence")
        elif isinstance(x, Tensor) and x.dim():
            sizes.setdefault(x.size(0), str((x.size(0), "...") if x.is_nested else tuple(x.shape)))
    return sizes


def fingerprint(batch: Any) -> list[Any]:
    """What tells one batch from another: shapes, types and evenly spaced elements of its tensors, and plain values."""
    return [_print(x) for x in _leaves(batch, set())]


def _print(x: Any) -> Any:
    if isinstance(x, PackedSequence):
        return (_print(x.data), _print(x.batch_sizes))
    if isinstance(x, Tensor):
        if x.is_nested or x.layout != torch.strided:
            return (x.dtype, x.layout)
        flat = x.detach().reshape(-1)
        kept = flat[:: flat.numel() // _COMPARED | 1].clone()  # the loader may use the memory again
        return (tuple(x.shape), x.dtype, kept)
    if isinstance(x, str | bytes | int | float | complex | None):
        return x
    if hasattr(x, "tobytes") and hasattr(x, "shape"):  # an array of numpy
        return (tuple(x.shape), x.tobytes())
    return type(x)


def same_prints(a: Any, b: Any) -> bool:
    """Whether two fingerprints are equal; NaN equals itself."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(_bits(a), _bits(b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_prints, a, b))
    return bool(a == b) or (a != a and b != b)


def _bits(t: Tensor) -> Tensor:
    t = t.resolve_conj().resolve_neg()
    return t.view(torch.uint8) if t.numel() else t
