"""Noise as a step of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch.utils.data import default_collate

__all__ = ["Collate", "with_entry"]


class Collate:
    """A ``collate_fn``: makes a batch and puts noise on its labels. A class, so that workers can be given it."""

    def __init__(
        self, noise: Callable[..., Any], collate_fn: Callable[[list[Any]], Any] | None, target: int, index: int | None
    ) -> None:
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn: {collate_fn!r} given; give a function of a list of items, or None")
        for name, entry in (("target", target), ("index", index)):
            if not (isinstance(entry, Integral) or (name == "index" and entry is None)):
                raise TypeError(f"{name}: {entry!r} given; give the place of an entry of a batch, such as 1")
        self.noise, self.target, self.index = noise, target, index
        self.collate_fn = collate_fn or default_collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate_fn(items)
        entries = (self.target,) if self.index is None else (self.target, self.index)
        if not isinstance(batch, tuple | list) or not all(-len(batch) <= e < len(batch) for e in entries):
            raise TypeError(
                f"collate: a batch is a {type(batch).__name__}, but the labels are its entry {self.target}"
                + ("" if self.index is None else f" and the numbers its entry {self.index}")
                + "; give a collate_fn that returns such a tuple"
            )
        index = None if self.index is None else batch[self.index]
        noisy = self.noise(batch[self.target], index=index)
        return with_entry(batch, self.target, noisy)


def with_entry(items: Any, place: int, value: Any) -> Any:
    """A tuple or list of the same type with another entry; a namedtuple takes its entries one by one."""
    made: list[Any] = list(items)
    made[place] = value
    return type(items)(*made) if hasattr(items, "_fields") else type(items)(made)
