"""What a batch is made of: its tensors, its size, and the same batch on another device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._devices import on_device

__all__ = ["cut", "fingerprint", "first_dimensions", "same_prints", "to_device"]

_COMPARED = 1 << 16  # elements of a tensor: some of every sample


def to_device(x: Any, device: torch.device) -> Any:
    """``x`` with its tensors on ``device``, in containers of the same types; the same object where nothing moves.

    Objects with a ``to`` method are moved by it: a copy of them, since some move themselves.
    """
    if isinstance(x, Tensor):
        if x.is_inference() and not torch.is_inference_mode_enabled():
            x = x.clone()  # features made in inference mode: autograd refuses the tensor, but takes a copy
        return x if x.device == device else on_device(x, device)
    if isinstance(x, PackedSequence):
        return x if x.data.device == device else x.to(device)  # type: ignore[arg-type]

    def move(item: Any) -> Any:
        return to_device(item, device)

    if isinstance(x, Mapping):
        return _map_items(x, move)
    if isinstance(x, list | tuple):
        return _map_sequence(x, move)
    if callable(getattr(x, "to", None)) and not isinstance(x, type):
        own = copy.copy(x)
        moved = own.to(device)
        return own if moved is None else moved
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _map_fields(x, move)
    return x


def cut(x: Any, start: int, stop: int, count: int, name: str) -> Any:
    """Samples ``start`` to ``stop`` of a batch of ``count``, in containers of the same types.

    Every tensor must count the samples in its first dimension. A list of ``count`` plain values has one for each
    sample; all other plain values belong to all of them.

    Raises:
        ValueError: a tensor, or an object that holds tensors, cannot be cut; the message begins with ``name``.
    """
    if isinstance(x, Tensor) and x.dim() and not x.is_nested and x.size(0) == count:
        return x[start:stop]

    def part(item: Any) -> Any:
        return cut(item, start, stop, count, name)

    if isinstance(x, Mapping):
        return _map_items(x, part)
    if isinstance(x, list | tuple):
        plain = len(x) == count and not any(isinstance(leaf, Tensor | PackedSequence) for leaf in _leaves(x, set()))
        return x[start:stop] if plain and type(x) in (list, tuple) else _map_sequence(x, part)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _map_fields(x, part)
    if isinstance(x, Tensor) or any(isinstance(leaf, Tensor | PackedSequence) for leaf in _leaves(x, set())):
        what = f"tensor of shape {_shape(x)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name}: cannot cut a {what} in a batch of {count} samples; give tensors with their samples in the first "
            "dimension, in lists, tuples, mappings or dataclasses, or batches that need not be cut"
        )
    return x


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _map_items(x: Mapping[Any, Any], f: Callable[[Any], Any]) -> Any:
    items = {key: f(value) for key, value in x.items()}
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


def _map_sequence(x: Any, f: Callable[[Any], Any]) -> Any:
    items = [f(item) for item in x]
    if _same(items, x):
        return x
    if hasattr(x, "_fields"):  # a named tuple takes its items one by one
        return type(x)(*items)
    if type(x) in (list, tuple) or isinstance(x, tuple):
        return type(x)(items)
    own = copy.copy(x)
    own[:] = items
    return own


def _map_fields(x: Any, f: Callable[[Any], Any]) -> Any:
    names = [field.name for field in dataclasses.fields(x)]
    items = [f(getattr(x, name)) for name in names]
    if _same(items, (getattr(x, name) for name in names)):
        return x
    own = copy.copy(x)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(own, name, item)  # frozen ones too: the copy is ours
    return own


def _shape(x: Tensor) -> str:
    return str((x.size(0), "...") if x.is_nested else tuple(x.shape))


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
            sizes.setdefault(x.size(0), _shape(x))
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
