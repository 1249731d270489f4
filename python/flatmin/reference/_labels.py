"""Label noise in plain torch: what the C and CUDA kernels of ``corrupt_labels`` and ``draw_samples`` compute."""

from __future__ import annotations

import torch
from torch import Tensor

from ._noise import draws_of, quad_words

__all__ = ["corrupt_labels", "draw_samples"]


def element_numbers(index: Tensor, count: int) -> Tensor:
    """The numbers of ``count`` elements: positions, or ``index[s] * inner + k`` for element k of sample s, where every
    sample has ``inner = count / len(index)`` elements."""
    positions = torch.arange(count, dtype=torch.int64, device=index.device)
    if index.numel() == 0 or count == 0:
        return positions
    inner = count // index.numel()
    return index.flatten().repeat_interleave(inner) * inner + positions % inner


def _words(numbers: Tensor, key: Tensor) -> Tensor:
    """The word of each number: word number % 4 of quad number // 4, of the tensor 0."""
    return quad_words(numbers >> 2, key, 0).gather(1, (numbers & 3).unsqueeze(1)).squeeze(1)


def corrupt_labels(
    labels: Tensor,
    index: Tensor,
    bounds: Tensor,
    targets: Tensor,
    key: Tensor,
    out: Tensor,
    classes: int,
    threshold: int,
    span: int,
    offset: int,
    ignore_index: int,
) -> None:
    """Write noisy labels to ``out``, from one word each, uniform on [0, 2^32).

    Without a table a word below ``threshold`` makes of label y the label (y + offset + r) mod classes, r uniform on
    [0, span): the word, stretched from [0, threshold) to 32 bits, times span. With one, ``bounds`` and ``targets``
    [classes, entries], the label becomes the target of the first entry of row y whose bound the word is below.
    """
    flat = labels.flatten()
    inside = (flat >= 0) & (flat < classes)
    wrong = (~inside & (flat != ignore_index)).nonzero()
    if wrong.numel() and labels.device.type == "cpu":
        at = int(wrong[0])
        raise RuntimeError(
            f"labels: element {at} is {int(flat[at])}, but there are {classes} classes, from 0 on, and {ignore_index} "
            "is ignored; mend the label, or give ignore_index"
        )
    y = torch.where(inside, flat, 0)
    word = _words(element_numbers(index, flat.numel()), key)
    if bounds.numel():
        rows = bounds.view(classes, -1)[y, :-1]
        entry = (word.unsqueeze(1) >= rows).sum(1)
        noisy = targets.view(classes, -1)[y, entry]
    else:
        stretch = max(32 - max(threshold, 1).bit_length(), 0)
        factor = min(2**63 // (max(threshold, 1) << stretch), 2**32 - 1)
        even = torch.where(word < threshold, word << stretch, 0) * factor >> 31
        moved = (y + offset + (even * span >> 32)) % classes
        noisy = torch.where(word < threshold, moved, y)
    out.copy_(torch.where(inside, noisy, flat).view(labels.shape))


def draw_samples(index: Tensor, key: Tensor, count: int, inner: int, law: int) -> Tensor:
    """Draws of a law of size 1, float32 [count, inner]: element k of sample s is a function of the key, its index (or
    position) and k."""
    numbers = element_numbers(index, count * inner)
    quads, word = numbers >> 2, (numbers & 3).unsqueeze(1)
    four = draws_of(quad_words(quads, key, 0), law)
    return four.gather(1, word).squeeze(1).view(count, inner).to(torch.float32)
