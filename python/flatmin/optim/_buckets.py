"""The set of parameters that a perturbation moves, with the backups that bring them back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from .. import ops, reference
from .._distributed import is_dtensor, local_gradient, shard_groups
from ..ops._dispatch import scalar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Bucket",
    "Mark",
    "PerturbedSet",
    "RestoreAndStep",
    "alike",
    "name_of",
    "params_of",
    "trained",
    "with_gradient",
]

#: An operator that restores and takes a base's step in one pass.
RestoreAndStep = Callable[..., Tensor]

#: Options of a group of which the operators take one for each parameter.
_OWN_NUMBERS = ("lr", "weight_decay")

# With map() these walk a list of tensors in C: 0.05 us each, a third of a comprehension that tests two of them.
_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")
_dtype, _device = attrgetter("dtype"), attrgetter("device")


def with_gradient(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of ``params`` that have a gradient, and the gradients."""
    grads = list(map(_grad, params))
    if all(map(is_not, grads, repeat(None))):
        return params, grads
    present = [grad is not None for grad in grads]
    return list(compress(params, present)), list(compress(grads, present))


def trained(params: list[Tensor], *others: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Those of ``params`` that are not frozen, and what lies beside them in ``others``."""
    if all(map(_requires_grad, params)):
        return params, *others
    kept = list(map(_requires_grad, params))
    return tuple(list(compress(each, kept)) for each in (params, *others))


def name_of(p: Tensor, groups: Sequence[dict[str, Any]]) -> str:
    """Where a parameter is in the groups, with its name if the groups have names."""
    for index, group in enumerate(groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is p:
                name = f" ({group['param_names'][position]})" if "param_names" in group else ""
                return f"param_groups[{index}]['params'][{position}]{name}"
    return f"a parameter of shape {tuple(p.shape)}"


def params_of(groups: Sequence[dict[str, Any]], indices: Sequence[int]) -> list[Tensor]:
    """The parameters of some groups, one after another."""
    if len(indices) == 1:
        params: list[Tensor] = groups[indices[0]]["params"]
        return params
    return list(chain.from_iterable(groups[index]["params"] for index in indices))


def alike(groups: Sequence[dict[str, Any]], keys: Sequence[str], *values: Sequence[Any]) -> list[tuple[int, ...]]:
    """Indices of the groups, those together that differ in none of ``keys`` and of their own ``values``, nor in the
    types and devices of their parameters. Of ``_OWN_NUMBERS`` each may have its own. A tensor is alike to itself alone:
    only its device knows its value."""
    if len(groups) == 1:
        return [(0,)]
    numbers = [key for key in keys if key in _OWN_NUMBERS]
    keys = [key for key in keys if key not in _OWN_NUMBERS]
    found: dict[Any, list[int]] = {}
    for index, (group, *own) in enumerate(zip(groups, *values, strict=True)):
        params = group["params"]
        kinds = [frozenset(map(kind, params)) for kind in (_dtype, _device, type)]
        rates = [None if isinstance(rate, int | float) else rate for rate in map(group.get, numbers)]
        options = (*kinds, *own, *rates, *map(group.get, keys))
        try:
            found.setdefault(options, []).append(index)
        except TypeError:  # a list among them
            found[index] = [index]
    return list(map(tuple, found.values()))


class Mark:
    """Bytes of a backup that the next operator will change, if it runs: an exception may come between the operator and
    the note that it ran, as Ctrl-C does, and only the backup tells then."""

    def __init__(self, backup: Tensor, params: Sequence[Tensor]) -> None:
        last = next((p for p in reversed(params) if p.numel() > 0), None)
        place = 0 if last is None else backup.numel() - reference.backup_nbytes([last])
        self._place = backup[place : place + 8].bitwise_not_()
        self._before = self._place.clone()

    def overwritten(self) -> bool:
        """Whether the operator ran. A backup that was not written gets its bytes back."""
        if not torch.equal(self._place, self._before):
            return True
        self._place.bitwise_not_()
        return False


class Bucket:
    """Parameters of groups with equal options on one device: one call of each operator.

    Attributes:
        groups: indices of the groups.
        params: the parameters, each once.
        shards: process groups over which DTensor parameters are sharded; None for plain tensors.
        dtype: the type of all of them, if they are plain tensors of one type, else None.
        backup: the bytes that they had before they moved; allocated when it is first asked for.
        moved: whether they are away from ``w``.
    """

    def __init__(self, groups: tuple[int, ...], params: list[Tensor], shards: tuple[ProcessGroup, ...] | None) -> None:
        self.groups = groups
        self.params = params
        self.shards = shards
        self.device = params[0].device
        self._backup: Tensor | None = None
        self._numbers: dict[int, tuple[list[float], Tensor]] = {}
        self.moved = False
        dtypes = set(map(_dtype, params))
        plain = set(map(type, params)) <= {nn.Parameter, Tensor}
        self.dtype = dtypes.pop() if plain and len(dtypes) == 1 else None
        self._dtype = params[0].dtype

    @property
    def backup(self) -> Tensor:
        if self._backup is None:
            self._backup = ops.backup_like(self.local())
        return self._backup

    def local(self) -> list[Tensor]:
        """The tensors to do arithmetic on: the parameters, or this rank's shards of them."""
        if self.shards is None:
            return self.params
        with torch.no_grad():  # a view for autograd otherwise
            return [p.to_local() for p in self.params]  # type: ignore[attr-defined]

    def local_grads(self) -> list[Tensor]:
        if self.shards is None:
            return list(map(_grad, self.params))
        with torch.no_grad():
            return [local_gradient(p) for p in self.params]

    def still_fits(self) -> bool:
        """False once the model was converted or moved, as by ``.half()`` or ``.cuda()``. Asked of the first parameter
        alone, since it is asked at every step; the operators refuse a backup that does not fit another."""
        first = self.params[0]
        return first.device == self.device and first.dtype == self._dtype

    def numbers(
        self, groups: Sequence[dict[str, Any]], values: Sequence[tuple[float, ...]]
    ) -> tuple[float, ...] | Tensor:
        """What operators take of numbers that belong to a group: those of all groups or, where groups differ, a float64
        tensor with those of each parameter's group, on the device.

        Kept while they stay the same: a copy to a device costs more than to compare them, and is not for a CUDA graph.

        Args:
            groups: the base's.
            values: for each of the bucket's groups as many numbers, 1 or more.
        """
        if values.count(values[0]) == len(values):
            return values[0]
        of = {id(p): value for g, value in zip(self.groups, values, strict=True) for p in groups[g]["params"]}
        numbers = list(chain.from_iterable(map(of.__getitem__, map(id, self.params))))
        width = len(values[0])
        known, tensor = self._numbers.get(width, ([], None))
        if tensor is None or known != numbers:
            shape = (-1, width) if width > 1 else (-1,)
            tensor = scalar(torch.tensor(numbers, dtype=torch.float64).view(shape), self.device)
            self._numbers[width] = numbers, tensor
        return tensor

    def bump_versions(self) -> None:
        """Autograd watches the DTensor, not the local tensor that the operators write to."""
        if self.shards is not None:
            increment_version(self.params)

    # -- away from w and back ------------------------------------------------------------------------------------------

    def restore(self) -> None:
        ops.restore_(self.local(), self.backup)
        self.moved = False
        self.bump_versions()

    def restore_and_step(
        self, operator: RestoreAndStep, *lists: list[Tensor], lr: float | Tensor, **options: Any
    ) -> None:
        """Restore, if the weights are away, and step in one pass over memory.

        Args:
            operator: of :mod:`flatmin.ops`: takes the parameters, ``lists``, the backup, ``lr``, ``options``, and
                curvatures to average (:class:`flatmin.ops.Averages`) where a bucket has some.
            lists: gradients, then the base's state.
        """
        operator(self.params, *lists, self.backup_to_step_from(), lr, **options)

    def backup_to_step_from(self) -> Tensor:
        """Empty where the weights are back at ``w``, or have not moved: a step starts from what they are now."""
        return self.backup if self.moved else torch.empty(0, dtype=torch.uint8, device=self.device)


B = TypeVar("B", bound=Bucket)


class PerturbedSet(Generic[B]):
    """Where the weights are. One object per wrapper, so that a shallow copy of the wrapper shares it.

    Attributes:
        perturbed: whether an ascent was made and not yet restored.
        buckets: those of the last ascent.
    """

    def __init__(self) -> None:
        self.perturbed = False
        self.buckets: list[B] = []
        self._known: dict[tuple[int, ...], tuple[list[Tensor], list[B]]] = {}

    def new_bucket(self, groups: tuple[int, ...], params: list[Tensor], shards: tuple[ProcessGroup, ...] | None) -> B:
        raise NotImplementedError

    def kind(self, p: Tensor) -> Hashable:
        """What parameters of such groups on one device must have in common to share a bucket."""
        return None

    def restore(self) -> None:
        """Bring back the bytes of every bucket that is still moved."""
        for bucket in self.buckets:
            if bucket.moved:
                bucket.restore()
        self.perturbed = False

    def partition(
        self, groups: Sequence[dict[str, Any]], keys: Sequence[str], *values: Sequence[Any]
    ) -> list[tuple[int, ...]]:
        """Indices of the groups, those together that share buckets: here each has its own. ``keys``: of a group's
        options; ``values``: of each group, beside its options."""
        return [(index,) for index in range(len(groups))]

    def buckets_of(self, indices: tuple[int, ...], params: list[Tensor]) -> list[B]:
        """The buckets of groups that share them. Kept with their backups while the same parameters are asked for: fresh
        memory would cost page faults, and a CUDA graph needs fixed addresses."""
        known, buckets = self._known.get(indices, ([], []))
        same = len(known) == len(params) and all(map(is_, known, params))
        if not same or not all(bucket.still_fits() for bucket in buckets):
            parts: dict[Any, list[Tensor]] = {}
            for p in dict.fromkeys(params):  # a tied parameter is listed twice, but moves once
                shards = shard_groups(p) if is_dtensor(p) else None
                parts.setdefault((p.device, shards, self.kind(p)), []).append(p)
            buckets = [self.new_bucket(indices, part, shards) for (_, shards, _), part in parts.items()]
            for other in [known for known in self._known if not set(known).isdisjoint(indices)]:
                del self._known[other]  # these groups were parted in another way
            self._known[indices] = list(params), buckets
        return buckets

    def at_rest(self, groups: Sequence[dict[str, Any]], keys: Sequence[str], *values: Sequence[Any]) -> list[B]:
        """Buckets of every parameter that is trained and has a gradient, whether it ever moves or not."""
        found: list[B] = []
        for indices in self.partition(groups, keys, *values):
            params, _ = trained(*with_gradient(params_of(groups, indices)))
            found += self.buckets_of(indices, params) if params else []
        return found

    def known_buckets(self) -> Iterator[B]:
        for _, buckets in self._known.values():
            yield from buckets

    def __getstate__(self) -> dict[str, Any]:
        """Backups at rest are scratch memory: not worth copying."""
        state = self.__dict__ | {"_known": {}}
        return state if self.perturbed else state | {"buckets": []}
