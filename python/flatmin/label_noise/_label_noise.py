"""Noise on class labels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from .._checks import check_int, check_size
from ..ops._labels import check_index
from ._collate import Collate
from ._dataset import NoisyDataset
from ._deferred import DeferredCheck, out_of_range
from ._kinds import CIFAR10_ASYMMETRIC, SYMMETRIC, Table, check_probability, integers, mapping_rows, matrix_rows
from ._stream import Stream

__all__ = ["LabelNoise"]

_NAMES = '"exclude_true", "uniform", "pair", "cifar10", "smooth", "gaussian", a mapping or a C x C matrix'
_SOFT = ("smooth", "gaussian")


class LabelNoise:
    """Makes class labels wrong with a known probability.

    ::

        noise = flatmin.LabelNoise(10, 0.2, "exclude_true")
        y = noise(y)                          # on a batch: fresh noise at every call
        train = noise.wrap(train)             # or on a data set, once: item i is always the same

    Draw once per batch, before the first pass: then both passes of SAM see the same labels (the closure of
    ``opt.step(closure)`` runs twice).

    Two conventions are both called "p % symmetric noise"; hence no default for ``kind``:

    ================  ===============================================================================  ==============
    kind              a label drawn anew (with probability p) becomes                                  share changed
    ================  ===============================================================================  ==============
    "exclude_true"    one of the C - 1 other classes, each as likely                                   p
    "uniform"         one of all C classes, the true one too                                           p (C - 1) / C
    "pair"            the next class, (y + 1) mod C                                                    p
    a mapping         ``mapping[y]``; a class that is no key keeps its labels                          p, those classes
    "cifar10"         the mapping truck to automobile, bird to airplane, deer to horse, cat and dog    p, those classes
    C x C matrix      j with probability ``matrix[y, j]``; give no ``p``                               1 - matrix[y, y]
    "smooth"          nothing is drawn: a soft target, 1 - p for y and p / (C - 1) for every other     -
    "gaussian"        a soft target, one-hot plus ``p`` times normal noise: p is a standard deviation  -
    ================  ===============================================================================  ==============

    "smooth" is the mean of "exclude_true" (torch's ``label_smoothing=e`` is ``p = e (C - 1) / C``).

    What becomes of a label is a function of the seed and of counters alone: the same bits on every CPU and GPU, for any
    number of threads. Without ``index`` each call, each rank of a process group and each worker of a DataLoader draws
    anew. With ``index``, the numbers of the samples in their data set, the noise of a sample depends on the seed, on
    :attr:`epoch` and on its number: not on the order of the batches, nor on how many workers there are.

    Args:
        num_classes: C.
        p: probability in [0, 1] that a label is drawn anew; of "gaussian" the standard deviation, finite and >= 0.
        kind: see above.
        ignore_index: the label, outside of [0, C), that is none and stays as it is; of soft targets the row is 0.
        generator: to draw the seed from (once); by default torch's own, so ``torch.manual_seed`` decides.

    Attributes:
        seed: of the noise, a 63-bit integer.
        epoch: part of what a call with ``index`` draws; set it with :meth:`set_epoch`, as a DistributedSampler's.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.

    Sources: Damian, Ma and Lee 2021 (arXiv 2106.06530) for fresh noise and "smooth"; Patrini et al. 2017 (arXiv
    1609.03683) for "cifar10".
    """

    def __init__(
        self,
        num_classes: int,
        p: float | None = None,
        kind: str | Mapping[int, int] | Tensor | Sequence[Sequence[float]] | None = None,
        *,
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
    ) -> None:
        check_int("num_classes", num_classes, 1)
        check_int("ignore_index", ignore_index, -(2**63))
        if num_classes >= 2**31:
            raise ValueError(f"num_classes: {num_classes} given; give fewer than 2^31")
        if ignore_index >= 2**63:
            raise ValueError(f"ignore_index: {ignore_index} given; give an integer below 2^63")
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index: {ignore_index} given, which is one of the {num_classes} classes, so that noise would "
                "make it of others; give a number outside of them"
            )
        self.num_classes, self.p, self.ignore_index = num_classes, p, ignore_index
        self._table: Table | None = None
        self._bounds: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.kind = self._read_kind(kind, p)
        self._stream = Stream(generator)
        self._check = DeferredCheck(num_classes, ignore_index)

    def _read_kind(self, kind: Any, p: Any) -> str:
        """The name of the kind; sets the table of those that have one."""
        c = self.num_classes
        named = isinstance(kind, str)
        if not named and (isinstance(kind, Sequence) or hasattr(kind, "__array__")):  # numpy's arrays, and tensors
            if p is not None:
                raise ValueError(f"p: {p} given, but the matrix of kind holds the probabilities; leave p out")
            self._table = matrix_rows(kind, c)
            return "matrix"
        if named and kind == "gaussian":
            check_size("p (the standard deviation of kind='gaussian')", p)
            return "gaussian"
        if not (isinstance(kind, Mapping) or (named and kind in (*SYMMETRIC, "cifar10", "smooth"))):
            raise ValueError(f"kind: {kind!r} given; give {_NAMES}")
        check_probability("p", p)
        if kind == "cifar10" and c != 10:
            raise ValueError(f"num_classes: {c} given, but kind='cifar10' is a map of 10 classes")
        if c == 1 and named and kind in ("exclude_true", "smooth"):
            raise ValueError(f"num_classes: 1 given, but kind={kind!r} needs another class to move to")
        if isinstance(kind, Mapping) or kind == "cifar10":
            self._table = mapping_rows(CIFAR10_ASYMMETRIC if kind == "cifar10" else kind, c, p)
        return kind if named else "mapping"

    # ---- rates ----

    @property
    def effective_rate(self) -> float:
        """The share of the labels that become others, where each class is as frequent.

        Of soft targets: of "smooth" the mass on other classes; of "gaussian" the share whose largest entry is another
        class.
        """
        if self._table is not None:
            return float(self._table.flips().mean())
        assert self.p is not None
        if self.kind == "gaussian":
            return _argmax_rate(self.num_classes, self.p)
        return float(self.p) * (SYMMETRIC[self.kind](self.num_classes) if self.kind in SYMMETRIC else 1.0)

    @property
    def transition_matrix(self) -> Tensor:
        """float64 [C, C]: row y holds the probability of each noisy label, given the true label y."""
        c, rate = self.num_classes, self.effective_rate
        if self._table is not None:
            return self._table.matrix()
        if self.kind == "pair":
            return (1.0 - rate) * torch.eye(c, dtype=torch.float64) + rate * torch.eye(c, dtype=torch.float64).roll(
                1, 1
            )
        matrix = torch.full((c, c), rate / max(c - 1, 1), dtype=torch.float64)
        return matrix.fill_diagonal_(1.0 - rate)

    def __repr__(self) -> str:
        asked = "" if self.p is None else f", p={self.p}"
        return f"LabelNoise(num_classes={self.num_classes}{asked}, kind={self.kind!r}, rate={self.effective_rate:.4g})"

    # ---- on a batch ----

    def __call__(self, labels: Any, *, index: Tensor | int | None = None) -> Any:
        """Noisy labels; the given ones are not written.

        Args:
            labels: int64 of any shape, or an integer (then the instance is a ``target_transform`` of torchvision).
            index: int64, the numbers of the samples in their data set: one for each label, or for each entry of the
                leading dimensions (one for each mask of a batch). Of one label an integer will do.

        Returns:
            int64 of the same shape on the same device, or an integer; of "smooth" and "gaussian" float32 with the
            classes as dimension 1, as torch's cross-entropy takes them (dimension 0 for a single label).

        Raises:
            RuntimeError: a label is out of range: on the CPU, before anything is returned. On a GPU the host does not
                wait: such a label stays as it is, and the next call that finds the answer raises, or :meth:`check`.
        """
        if not isinstance(labels, Tensor):
            return self._one(labels, index)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: {labels.dtype} given; give int64 (labels.long())")
        if index is not None:
            index = check_index(index, labels, "labels")
        if labels.device.type != "cpu":
            self._check.watch(labels)
        if self.kind in _SOFT:
            return self._soft(labels, index)
        key = self._stream.key(index is not None, labels.device)
        return self._corrupt(labels, key, index)

    def _one(self, label: Any, index: Any) -> Any:
        try:
            value = operator.index(label)
        except TypeError:
            raise TypeError(f"labels: {type(label).__name__} given; give an int64 tensor or an integer") from None
        if not -(2**63) <= value < 2**63:
            raise RuntimeError(out_of_range(0, value, self.num_classes, self.ignore_index))
        noisy: Tensor = self(torch.tensor(value, dtype=torch.int64), index=index)
        return noisy if self.kind in _SOFT else int(noisy)

    def _corrupt(self, labels: Tensor, key: Tensor, index: Tensor | None) -> Tensor:
        common: dict[str, Any] = {"index": index, "ignore_index": self.ignore_index}
        if self._table is None:
            assert self.p is not None
            return ops.corrupt_labels(labels, key, self.num_classes, self.p, kind=self.kind, **common)
        if labels.device not in self._bounds:
            bounds, targets = self._table.bounds()
            self._bounds[labels.device] = bounds.to(labels.device), targets.to(labels.device)
        return ops.corrupt_labels(labels, key, self.num_classes, table=self._bounds[labels.device], **common)

    def _soft(self, labels: Tensor, index: Tensor | None) -> Tensor:
        assert self.p is not None
        c, kept = self.num_classes, labels == self.ignore_index
        if labels.device.type == "cpu":
            wrong = ((labels < 0) | (labels >= c)) & ~kept
            if bool(wrong.any()):
                at = int(wrong.flatten().to(torch.uint8).argmax())
                raise RuntimeError(out_of_range(at, int(labels.flatten()[at]), c, self.ignore_index))
        rest = self.p / (c - 1) if self.kind == "smooth" else 0.0
        target = torch.full((*labels.shape, c), rest, device=labels.device)
        inside = labels.clamp(0, c - 1).unsqueeze(-1)
        target.scatter_(-1, inside, 1.0 - self.p if self.kind == "smooth" else 1.0)
        if self.kind == "gaussian":
            samples = labels.numel() if index is None else index.numel()
            inner = labels.numel() * c // max(samples, 1)
            key = self._stream.key(index is not None, labels.device)
            flat = None if index is None else index.flatten()
            target += self.p * ops.draw_samples(samples, inner, key, index=flat).view(target.shape)
        target.masked_fill_(kept.unsqueeze(-1), 0.0)
        return target.movedim(-1, 1) if labels.dim() > 0 else target

    def check(self) -> None:
        """Wait for the device and raise ``RuntimeError`` if a label of an earlier call was out of range."""
        self._check.poll(wait=True)

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    @property
    def seed(self) -> int:
        return self._stream.seed

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins: calls with ``index`` then draw anew. Workers that live on see it too."""
        self._stream.set_epoch(epoch)

    # ---- on a data set ----

    def corrupt(self, labels: Any) -> Tensor:
        """Noisy labels of a whole data set, an exact number of which differ from the given ones.

        Of n labels (ignored ones do not count) ``round(effective_rate n)`` change: of "uniform" too, where others draw
        p n labels anew and leave to chance how many change. With a mapping or a matrix the number is exact for each
        class: ``round(rate of the class * labels of the class)``. Which ones, and what they become, are functions of
        the seed and of the positions: every call returns the same.

        Args:
            labels: integers of any shape, as a tensor, list or array.

        Returns:
            int64 tensor of the same shape, on the CPU.
        """
        if self.kind in _SOFT:
            raise ValueError(f"kind={self.kind!r} makes soft targets, not labels; it has no data set of noisy labels")
        if isinstance(labels, Tensor) and labels.dtype == torch.bool:
            raise TypeError(f"labels: {labels.dtype} given; give integers")
        y = integers("labels", labels)
        flat = y.flatten()
        moved = self._moved_for_sure(flat)
        group, counts = self._numbers_to_flip(flat)
        chosen = _choose(group, counts, self._stream.choice_key())
        return torch.where(chosen, moved, flat).view(y.shape)

    def _moved_for_sure(self, flat: Tensor) -> Tensor:
        """What each label becomes if it changes. Refuses labels out of range."""
        key, common = self._stream.target_key(), dict[str, Any](ignore_index=self.ignore_index)
        if self._table is not None:
            table = self._table.given_flip().bounds()
            return ops.corrupt_labels(flat, key, self.num_classes, table=table, **common)
        kind = "pair" if self.kind == "pair" or self.num_classes == 1 else "exclude_true"
        return ops.corrupt_labels(flat, key, self.num_classes, kind=kind, **common)

    def _numbers_to_flip(self, flat: Tensor) -> tuple[Tensor, list[int]]:
        """A group for each label (-1: none) and how many of each group change."""
        valid = flat != self.ignore_index
        if self._table is None:
            return torch.where(valid, 0, -1), [round(self.effective_rate * int(valid.sum()))]
        sizes = flat[valid].bincount(minlength=self.num_classes).tolist()
        rates = self._table.flips().tolist()
        return torch.where(valid, flat, -1), [round(r * n) for r, n in zip(rates, sizes, strict=True)]

    def wrap(self, dataset: Any, labels: Any = None, *, progress: bool | None = None) -> NoisyDataset:
        """``dataset`` with the labels of :meth:`corrupt`: see :class:`flatmin.label_noise.NoisyDataset`.

        Args:
            dataset: items are tuples whose second entry is the label.
            labels: those of all items, if known; else they are taken from the data set (``targets``, ``labels`` or the
                last of ``tensors``, through any ``Subset``), or its items are read once.
            progress: of reading the items; None shows a bar in a terminal, if it takes long.
        """
        return NoisyDataset(dataset, self.corrupt, labels, progress)

    def collate(
        self, collate_fn: Callable[[list[Any]], Any] | None = None, *, target: int = 1, index: int | None = None
    ) -> Collate:
        """A ``collate_fn`` of a DataLoader that makes batches with fresh noise, in the workers if there are any.

        Args:
            collate_fn: makes the batch; torch's default.
            target: which entry of a batch holds the labels.
            index: which entry holds the numbers of the samples, if any does; set :meth:`set_epoch` then.
        """
        return Collate(self, collate_fn, target, index)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw on where this one stopped: seed, number of calls and epoch."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw on where the noise with this :meth:`state_dict` stopped."""
        self._stream.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_bounds"] = {}
        state["_check"] = DeferredCheck(self.num_classes, self.ignore_index)
        return state


def _argmax_rate(classes: int, sigma: float) -> float:
    """How often one of C - 1 normal numbers of size sigma is above 1 plus another: by the trapezoidal rule."""
    if sigma == 0.0 or classes == 1:
        return 0.0
    z = torch.linspace(-10.0, 10.0, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    below = torch.special.ndtr(z + 1.0 / sigma) ** (classes - 1)
    return float(torch.trapezoid(density * (1.0 - below), z))


def _choose(group: Tensor, counts: list[int], key: Tensor) -> Tensor:
    """bool, like ``group``: ``counts[g]`` of each group g, those with the smallest of 63 random bits."""
    words = reference.random_words(2 * len(group), key, 0).view(-1, 2)
    order = (words[:, 0] << 31 | words[:, 1] >> 1).argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, at random within
    sizes = (group + 1).bincount(minlength=len(counts) + 1)
    first = sizes.cumsum(0) - sizes
    sorted_group = group[order]
    place = torch.arange(len(group)) - first[sorted_group + 1]
    chosen = torch.zeros(len(group), dtype=torch.bool)
    chosen[order] = place < torch.tensor([0, *counts])[sorted_group + 1]
    return chosen
