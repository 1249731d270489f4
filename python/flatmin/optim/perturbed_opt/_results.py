"""What a closure returned at each of several draws, as one result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._checks import is_number

__all__ = ["mean_result"]


def mean_result(values: list[Any]) -> Any:
    """The mean of what a closure returned: of numbers and tensors, and of each in a tuple, list or mapping. What has no
    mean, such as a string or tensors of different shapes, is that of the first draw."""
    first = values[0]
    if all(isinstance(value, Tensor) and value.shape == first.shape for value in values):
        mean: Tensor = torch.stack([value.detach() for value in values])
        return mean.mean(0) if mean.is_floating_point() or mean.is_complex() else first
    if all(is_number(value) and not isinstance(value, bool) for value in values):
        return sum(values) / len(values)
    if isinstance(first, Mapping) and all(
        isinstance(value, Mapping) and value.keys() == first.keys() for value in values
    ):
        return {key: mean_result([value[key] for value in values]) for key in first}
    if type(first) in (tuple, list) and all(type(v) is type(first) and len(v) == len(first) for v in values):
        return type(first)(mean_result(list(column)) for column in zip(*values, strict=True))
    return first
