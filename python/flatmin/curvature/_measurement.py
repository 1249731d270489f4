"""What every measurement of a model shares: weighted batches, passes that repeat each other, a model left as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._rng import Generators
from ._arguments import check_params, check_tensors, describe, names_of, refuse_not_finite
from ._batches import Source
from ._derivatives import batch_hvp, gradient, refuse_once_differentiable, second
from ._progress import ProgressBar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LABELS",
    "MOVES",
    "NOISE",
    "LossFn",
    "Measurement",
    "Part",
    "batch_hvp",
    "check_tensors",
    "gradient",
    "names_of",
    "refuse_not_finite",
    "refuse_once_differentiable",
    "second",
    "shared_by",
]

#: What random numbers are for: each purpose has its own stream. 0 is that of the probes. See docs/random.md.
MOVES, NOISE, LABELS = 1, 2, 3

LossFn = Callable[[Any, Any], Tensor]


class Part(NamedTuple):
    """The parameters on one device: one call of each operator, and a stream of random numbers of its own."""

    stream: int
    device: torch.device
    positions: list[int]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those of a list like the parameters that belong to this device."""
        return [tensors[i] for i in self.positions]

    def key(self, seed: int, draw: int, purpose: int = 0) -> Tensor:
        """Of the ``draw``-th random list for ``purpose``."""
        return ops.random_key(int(seed), draw, purpose << 8 | self.stream, self.device)


class Measurement:
    """A model, a loss and the data over which it is measured, for the time of a ``with`` block.

    The loss is that of the model in the mode in which it is, as a fixed function of the weights: each pass over
    ``data`` starts with the random numbers and the buffers that the block was entered with, so that dropout draws the
    same masks and a shuffling loader the same order. The generators of torch, Python and numpy are set back, and those
    that a module of the model keeps as an attribute. A criterion that is a module counts as one of the model's. On exit
    weights, buffers and generators are as they were, whatever happened. ``.grad``, ``requires_grad`` and the mode are
    never touched.

    Args:
        model: called as ``model(inputs)``, or as :class:`Batches` says.
        loss_fn: mean loss of a batch, ``loss_fn(model(inputs), targets)``.
        data: batches ``(inputs, targets)`` that can be iterated repeatedly, one such pair, :class:`Batches`, or the
            :class:`Source` of a measurement that this one is part of. Batches are moved to the device of the first
            parameter. In means over the data a batch counts as often as it has samples.
        params: the parameters to differentiate by, None for all of ``model`` that require gradients.
        name: shown at the progress bar.
        passes: over ``data``, as planned: the length of the progress bar.
        progress: True or False; None shows a bar where stderr is a terminal, after two seconds.
        process_group: each of its ranks measures its share of the data, and means are over all samples of all ranks.
            None: that of ``data``, if it is a :class:`Source`.

    Attributes:
        params: the parameters, in order.
        parts: the same by device.
        data: the :class:`Source` of the batches: give it to measurements that are part of this one.
        backups: the bytes of each part at ``w``, once the weights have moved.
        count: number of samples in the last complete pass; after a mean, on all ranks.
        own_count: on this one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        data: Any,
        params: Any,
        name: str,
        passes: int = 1,
        progress: bool | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {type(model).__name__} given; give the torch.nn.Module that is measured")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: {type(loss_fn).__name__} given; give a function of model(inputs) and targets")
        if any(_reduction(f) == "sum" for f in _wrapped(loss_fn)):
            raise ValueError(
                "loss_fn: has reduction='sum', but measurements take the mean loss of a batch, and weigh it by the "
                "batch's size themselves; give reduction='mean', and multiply the result if you need the sum"
            )
        self.model = model
        self.loss_fn = loss_fn
        self.params = check_params(model, params)
        self.data = Source.of(data)
        self.data.process_group = self.process_group = process_group or self.data.process_group
        self.count = self.own_count = 0
        devices = list(dict.fromkeys(p.device for p in self.params))
        self.parts = [
            Part(stream, device, [i for i, p in enumerate(self.params) if p.device == device])
            for stream, device in enumerate(devices)
        ]
        length = self.data.length
        self._bar = ProgressBar(name, None if length is None else passes * length, progress)
        self.backups: list[Tensor] = []
        self._away = False

    def __enter__(self) -> Measurement:
        criteria = [f for f in _wrapped(self.loss_fn) if isinstance(f, nn.Module)]
        modules = list(dict.fromkeys(module for root in (self.model, *criteria) for module in root.modules()))
        self._buffers = [
            (module._buffers, {key: None if b is None else (b, b.clone()) for key, b in module._buffers.items()})
            for module in modules
        ]
        self._random = Generators(self.model)
        self._own_random = self.data.generators(modules)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.callback(self._bar.close)
            stack.callback(self.rewind)
            stack.callback(self._come_back)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def note(self, text: str) -> None:
        """Show ``text`` beside the progress bar."""
        self._bar.note(text)

    # -- passes over the data --------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Any, Any, int]]:
        """One pass: inputs, targets and the number of samples of each batch."""
        self.rewind()
        seen = 0
        for inputs, targets, size in self.data.read(self.params[0].device):
            if size:
                seen += size
                yield inputs, targets, size
            self._bar.advance()
        self.count = self.own_count = seen

    def outputs(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """What the model makes of a batch, and the targets: the arguments of the loss."""
        return self.data.outputs(self.model, inputs, targets)

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch, 0-dim."""
        return self.loss_of(*self.outputs(inputs, targets))

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """The same, of what the model has returned."""
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn: returned a {describe(loss)}; return the mean loss of the batch, one number")
        return loss.reshape(())

    @torch.no_grad()
    def mean_loss(self) -> Tensor:
        """Mean loss over the data, 0-dim, float64 where the device has it."""
        total: Tensor | float = 0.0
        for inputs, targets, size in self.batches():
            loss = self.loss(inputs, targets)
            total = total + size * loss.to(torch.float32 if loss.device.type == "mps" else torch.float64)
        assert isinstance(total, Tensor)
        self._over_ranks([total])
        return total / self.count

    def mean(self, term: Callable[[Any, Any], Sequence[Tensor | None]]) -> list[Tensor]:
        """Mean over the data of a list like the parameters, where None is 0. At least float32."""
        total = self.zeros()
        for inputs, targets, size in self.batches():
            for t, x in zip(total, term(inputs, targets), strict=True):
                if x is not None:
                    t.add_(x, alpha=size)
        self._over_ranks(total)
        for t in total:
            t.div_(self.count)
        return total

    def mean_square(self, term: Callable[[Any, Any], tuple[Sequence[Tensor | None], float]]) -> list[Tensor]:
        """Mean over the data of ``scale x^2``, where ``term`` gives a batch's list and scale."""
        mean = self.zeros()
        seen = 0
        for inputs, targets, size in self.batches():
            seen += size
            xs, scale = term(inputs, targets)
            sources = [_dense(x, m) for x, m in zip(xs, mean, strict=True)]
            for part in self.parts:
                ops.curvature_(part.of(mean), part.of(sources), decay=1.0 - size / seen, source_scale=scale)
        if self.process_group is not None:
            for t in mean:
                t.mul_(self.own_count)
            self._over_ranks(mean)
            for t in mean:
                t.div_(self.count)
        return mean

    def summed(self, *numbers: float) -> list[float]:
        """Numbers of this rank, added up over all."""
        if self.process_group is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.params[0].device)
        torch.distributed.all_reduce(sums, group=self.process_group)
        return sums.tolist()

    def _over_ranks(self, sums: Sequence[Tensor]) -> None:
        """Sums over the samples of this rank become, in place, those over the samples of all, and so does ``count``."""
        if self.process_group is None:
            return
        for t in sums:
            torch.distributed.all_reduce(t, group=self.process_group)
        self.count = int(self.summed(self.own_count)[0])

    def zeros(self) -> list[Tensor]:
        """A list like the parameters in memory order, at least float32."""
        with torch.no_grad():
            return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.params]

    # -- derivatives -----------------------------------------------------------------------------------------------

    def batch_gradient(self, inputs: Any, targets: Any) -> list[Tensor | None]:
        return gradient(self.loss(inputs, targets), self.params)

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """``H v`` by automatic differentiation, twice."""

        def term(inputs: Any, targets: Any) -> list[Tensor | None]:
            return batch_hvp(self.loss(inputs, targets), self.params, vectors)

        return self.mean(term)

    def difference(
        self, plus: Callable[[Part, Tensor], object], minus: Callable[[Part, Tensor], object], step: float
    ) -> list[Tensor]:
        """``(g(w + step v) - g(w - step v)) / (2 step)``. ``plus`` and ``minus`` move a part from ``w`` to one side."""
        with self.moved(plus):
            result = self.mean(self.batch_gradient)
        with self.moved(minus):
            for r, g in zip(result, self.mean(self.batch_gradient), strict=True):
                r.sub_(g).div_(2.0 * step)
        return result

    def step_size(self, norm: float) -> float:
        """Step of a central difference along ``v`` with ``||v|| = norm``: ``cbrt(eps) (1 + ||w||) / ||v||``, eps the
        machine epsilon of the coarsest parameter, which balances its errors of step^2 and eps / step."""
        epsilon = max(torch.finfo(p.dtype).eps for p in self.params)
        return float(epsilon ** (1.0 / 3.0) * (1.0 + self.norm(self.params)) / norm)

    def norm(self, tensors: Sequence[Tensor]) -> float:
        return math.hypot(*(float(ops.norm(part.of(tensors))) for part in self.parts))

    # -- moving the weights ----------------------------------------------------------------------------------------

    @contextmanager
    def moved(self, move: Callable[[Part, Tensor], object]) -> Iterator[None]:
        """Context in which ``move(part, backup)`` has moved each part of the weights; they come back bit for bit."""
        if not self.backups:
            # a step of radius 0 saves without moving: from here on the backups hold w, whenever an exception comes
            backups = [ops.backup_like(part.of(self.params)) for part in self.parts]
            for part, backup in zip(self.parts, backups, strict=True):
                one = torch.ones((), dtype=torch.float64, device=part.device)
                ops.sam_ascend_(part.of(self.params), part.of(self.params), backup, one, 0.0)
            self.backups = backups
        try:
            self._away = True
            self._move(move)
            yield
        finally:
            self._come_back()

    def _move(self, move: Callable[[Part, Tensor], object]) -> None:
        for part, backup in zip(self.parts, self.backups, strict=True):
            move(part, backup)

    def _come_back(self) -> None:
        if self._away:
            for part, backup in zip(self.parts, self.backups, strict=True):
                ops.restore_(part.of(self.params), backup)
            self._away = False

    @torch.no_grad()
    def rewind(self) -> None:
        """Bring random numbers and buffers to where they were on entry."""
        torch.clear_autocast_cache()  # it holds 16-bit copies of the weights
        self._random.set()
        self._own_random.set()
        for buffers, before in self._buffers:
            for key, now in list(buffers.items()):
                if key not in before:  # a forward pass has registered it
                    del buffers[key]
                elif before[key] is None and now is not None:
                    buffers[key] = None
            for key, pair in before.items():
                if pair is not None:
                    buffers[key] = pair[0]
                    if not torch.equal(*pair):  # a copy would invalidate graphs that hold the buffer
                        pair[0].copy_(pair[1])


def shared_by(model: nn.Module, process_group: ProcessGroup | None) -> tuple[nn.Module, ProcessGroup | None]:
    """The model, and the group whose ranks share the data: a DistributedDataParallel brings its own, and is taken off,
    as ``torch.autograd.grad`` does not work through it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, process_group or model.process_group
    return model, process_group


def _wrapped(loss_fn: Any) -> Iterator[Any]:
    """``loss_fn`` and what it wraps: the function of a partial one, the criterion of one that also counts."""
    while loss_fn is not None:
        yield loss_fn
        loss_fn = loss_fn.func if isinstance(loss_fn, functools.partial) else getattr(loss_fn, "__wrapped__", None)


def _reduction(loss_fn: Any) -> Any:
    """Of one of torch's criteria, or of a partial function; None where it is not said."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get("reduction")
    return getattr(loss_fn, "reduction", None)


def _dense(x: Tensor | None, like: Tensor) -> Tensor:
    """``x`` as the operators take it, 0 for None."""
    if x is None:
        return like.new_zeros(()).expand(like.shape)
    return (x if x.layout == torch.strided else x.to_dense()).to(like.dtype)
