"""Noise as a step of a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import default_collate

__all__ = ["Collate"]


class Collate:
    """A ``collate_fn``: makes a batch and puts noise on its labels. A class, so that workers can be given it."""

    def __init__(
        self, noise: Callable[..., Any], collate_fn: Callable[[list[Any]], Any] | None, target: int, index: int | None
    ) -> None:
        self.noise, self.target, self.index = noise, target, index
        self.collate_fn = collate_fn or default_collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate_fn(items)
        if not isinstance(batch, tuple | list) or max(self.target, self.index or 0) >= len(batch):
            raise TypeError(
                f"collate: a batch is a {type(batch).__name__}, but the labels are its entry {self.target}"
                + ("" if self.index is None else f" and the numbers its entry {self.index}")
                + "; give a collate_fn that returns such a tuple"
            )
        index = None if self.index is None else batch[self.index]
        noisy = self.noise(batch[self.target], index=index)
        return type(batch)([*batch[: self.target], noisy, *batch[self.target + 1 :]])
