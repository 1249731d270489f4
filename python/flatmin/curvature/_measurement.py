"""What every measurement of a model shares: weighted batches, passes that repeat each other, a model left as it was."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._devices import on_device
from .._distributed import is_dtensor
from .._rng import Generators

__all__ = [
    "MOVES",
    "NOISE",
    "LossFn",
    "Measurement",
    "Part",
    "batch_hvp",
    "check_data",
    "check_tensors",
    "names_of",
    "refuse_not_finite",
]

#: What random numbers are for: each purpose has its own stream. 0 is that of the probes.
MOVES, NOISE = 1, 2

LossFn = Callable[[Any, Any], Tensor]

#: What torch says where an operator cannot be differentiated twice: attention kernels, cuDNN's RNNs, functions marked
#: once_differentiable, compiled graphs.
_NO_DOUBLE_BACKWARD = re.compile(r"derivative for .* is not implemented|differentiate twice|double.?backward", re.I)


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
        return ops.random_key(seed, draw, purpose << 8 | self.stream, self.device)


class Measurement:
    """A model, a loss and the data over which it is measured, for the time of a ``with`` block.

    The loss is that of the model in the mode in which it is, as a fixed function of the weights: each pass over
    ``data`` starts with the random numbers and the buffers that the block was entered with, so that dropout draws the
    same masks and a shuffling loader the same order. On exit weights, buffers and generators are as they were, whatever
    happened. ``.grad``, ``requires_grad`` and the mode are never touched.

    Args:
        model: called as ``model(inputs)``.
        loss_fn: mean loss of a batch, ``loss_fn(model(inputs), targets)``.
        data: batches ``(inputs, targets)`` that can be iterated repeatedly, or one such pair. They are moved to the
            device of the first parameter. A batch counts ``len(targets)`` times in means over the data.
        params: the parameters to differentiate by, None for all of ``model`` that require gradients.
        name: shown at the progress bar.
        passes: over ``data``, as planned: the length of the progress bar.
        progress: True or False; None shows a bar where stderr is a terminal, after two seconds.

    Attributes:
        params: the parameters, in order.
        parts: the same by device.
        backups: the bytes of each part at ``w``, once the weights have moved.
        count: number of samples in the last complete pass.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: {type(model).__name__} given; give the torch.nn.Module that is measured")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: {type(loss_fn).__name__} given; give a function of model(inputs) and targets")
        self.model = model
        self.loss_fn = loss_fn
        self.params = _check_params(model, params)
        self.data = check_data(data)
        self.count = 0
        devices = list(dict.fromkeys(p.device for p in self.params))
        self.parts = [
            Part(stream, device, [i for i, p in enumerate(self.params) if p.device == device])
            for stream, device in enumerate(devices)
        ]
        self._bar = _Bar(name, passes * len(self.data) if hasattr(self.data, "__len__") else None, progress)
        self.backups: list[Tensor] = []
        self._away = False

    def __enter__(self) -> Measurement:
        self._buffers = [
            (module, key, buffer, buffer.clone())
            for module in self.model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._random = Generators(self.model)
        self._own_random = [(generator, generator.get_state()) for generator in _generators_of(self.data)]
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
        device = self.params[0].device
        seen = 0
        for batch in self.data:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ValueError(f"data: a batch is a {_describe(batch)}; batches are pairs (inputs, targets)")
            inputs, targets = _to_device(batch[0], device), _to_device(batch[1], device)
            try:
                size = len(targets)
            except TypeError:
                raise ValueError("data: the targets of a batch have no length; give one target per sample") from None
            if size:
                seen += size
                yield inputs, targets, size
            self._bar.advance()
        if not seen:
            raise ValueError("data: holds no samples; give batches that can be iterated repeatedly, as a DataLoader")
        self.count = seen

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch, 0-dim."""
        return self.loss_of(self.model(inputs), targets)

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """The same, of what the model has returned."""
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn: returned a {_describe(loss)}; return the mean loss of the batch, one number")
        return loss.reshape(())

    @torch.no_grad()
    def mean_loss(self) -> Tensor:
        """Mean loss over the data, 0-dim, float64 where the device has it."""
        total: Tensor | float = 0.0
        for inputs, targets, size in self.batches():
            loss = self.loss(inputs, targets)
            total = total + size * loss.to(torch.float32 if loss.device.type == "mps" else torch.float64)
        assert isinstance(total, Tensor)
        return total / self.count

    def mean(self, term: Callable[[Any, Any], Sequence[Tensor | None]]) -> list[Tensor]:
        """Mean over the data of a list like the parameters, where None is 0. At least float32."""
        total = self.zeros()
        for inputs, targets, size in self.batches():
            for t, x in zip(total, term(inputs, targets), strict=True):
                if x is not None:
                    t.add_(x, alpha=size)
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
        return mean

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
        for generator, state in self._own_random:
            generator.set_state(state)
        for module, key, buffer, saved in self._buffers:
            module._buffers[key] = buffer
            if not torch.equal(buffer, saved):  # a copy would invalidate graphs that hold the buffer
                buffer.copy_(saved)


def gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """Of a batch; None for parameters that the loss does not use."""
    if not loss.requires_grad:
        return [None] * len(params)
    if create_graph:
        refuse_once_differentiable(loss)
    return list(torch.autograd.grad(loss, list(params), create_graph=create_graph, allow_unused=True))


def second(
    grads: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor], retain_graph: bool = False
) -> list[Tensor | None]:
    """Derivative of ``<grads, vectors>``. ``RuntimeError`` that names the way out where it does not exist."""
    try:
        return list(
            torch.autograd.grad(grads, list(params), list(vectors), retain_graph=retain_graph, allow_unused=True)
        )
    except RuntimeError as error:
        if not _NO_DOUBLE_BACKWARD.search(str(error)):
            raise
        raise _not_twice(f"torch says: {error}") from error


def refuse_once_differentiable(result: Tensor) -> None:
    """``RuntimeError`` if ``result`` comes from a function marked ``once_differentiable``. torch says so only where
    what flows back depends on the weights, and takes its derivative for a constant elsewhere: in a loss, always."""
    seen: set[Any] = set()
    pending = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise _not_twice(f"{function.__name__} is marked once_differentiable.")
        pending.extend(following for following, _ in node.next_functions)


_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def _not_twice(why: str) -> RuntimeError:
    return RuntimeError(
        "an operator of the model, or the loss, cannot be differentiated twice. Give method='finite_difference' (every "
        "function of flatmin.curvature that takes a method, and pacgen, has it), or for attention compute within "
        f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH). {why}"
    )


def batch_hvp(loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    """In a function of its own, so that a batch's graph is gone before the next one is built."""
    pairs = [
        (g, v.to(g.dtype))
        for g, v in zip(gradient(loss, params, create_graph=True), vectors, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:  # linear in every parameter
        return [None] * len(params)
    return second([g for g, _ in pairs], params, [v for _, v in pairs])


# ---- checks ----


def _check_params(model: nn.Module, params: Any) -> list[Tensor]:
    if params is None:
        chosen: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not chosen:
            raise ValueError("model: none of its parameters requires a gradient; there is nothing to measure")
    elif isinstance(params, Tensor):
        raise TypeError("params: one tensor given; give a list of tensors, [weight]")
    else:
        chosen = list(params)
        if not chosen:
            raise ValueError("params: empty; give parameters of the model, or None for all")
    for i, p in enumerate(chosen):
        if not isinstance(p, Tensor):
            raise TypeError(f"params: item {i} is a {type(p).__name__}; give tensors")
        if is_dtensor(p):
            raise TypeError(f"params: tensor {i} is a DTensor; measure the unsharded model (full_tensor())")
        if not p.is_floating_point() or p.layout != torch.strided:
            raise TypeError(f"params: tensor {i} is a {_describe(p)}; give dense tensors of real numbers")
        if not p.requires_grad:
            raise ValueError(f"params: tensor {i} does not require a gradient; leave it out or set requires_grad")
    if len(set(map(id, chosen))) != len(chosen):
        raise ValueError("params: a tensor is given twice; give each once")
    return chosen


def check_data(data: Any) -> Any:
    if isinstance(data, list | tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return [data]
    if isinstance(data, Tensor) or not hasattr(data, "__iter__"):
        raise TypeError(f"data: a {_describe(data)} given; give batches (inputs, targets), or one such pair")
    if isinstance(data, Iterator):
        raise TypeError("data: an iterator given, which is used up after one pass; give a list or a DataLoader")
    return data


def check_tensors(name: str, tensors: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` as a list, if it is one like ``params``: else ``TypeError`` or ``ValueError``."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: a {_describe(tensors)} given; give a list of tensors, one for each parameter")
    if len(tensors) != len(params):
        raise ValueError(f"{name}: {len(tensors)} tensors given for {len(params)} parameters; give one for each")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if not isinstance(t, Tensor) or t.shape != p.shape or t.device != p.device or not t.is_floating_point():
            wanted = f"floating-point tensor of shape {tuple(p.shape)} on {p.device}"
            raise ValueError(f"{name}: item {i} is a {_describe(t)}; parameter {i} needs a {wanted}")
    return [t.detach().to(torch.promote_types(p.dtype, torch.float32)) for t, p in zip(tensors, params, strict=True)]


def names_of(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    """Names as in ``model.named_parameters()``."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known.get(id(p), f"params[{i}]") for i, p in enumerate(params)]


def refuse_not_finite(what: str, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """``ValueError`` that names the first parameter of which ``what`` is NaN or infinite."""
    for t, name in zip(tensors, names, strict=True):
        bad = int((~t.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{what}: not finite in {bad} of {t.numel()} elements of {name!r}; check the weights, the loss and the "
                "data for NaN and infinity"
            )


# ---- helpers ----


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} of length {len(x)}" if isinstance(x, list | tuple) else type(x).__name__


def _dense(x: Tensor | None, like: Tensor) -> Tensor:
    """``x`` as the operators take it, 0 for None."""
    if x is None:
        return like.new_zeros(()).expand(like.shape)
    return (x if x.layout == torch.strided else x.to_dense()).to(like.dtype)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return on_device(batch, device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_to_device(item, device) for item in batch)
    return batch


def _generators_of(data: Any) -> list[torch.Generator]:
    """The generators that a loader, or its sampler, shuffles with."""
    owners = [data, getattr(data, "sampler", None)]
    found = [x for owner in owners for x in getattr(owner, "__dict__", {}).values() if isinstance(x, torch.Generator)]
    return list(dict.fromkeys(found))


class _Bar:
    """A progress bar, if tqdm is here and it is wanted."""

    def __init__(self, name: str, total: int | None, progress: bool | None) -> None:
        self._bar: Any = None
        if progress is False:
            return
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError:
            return
        # disable=None asks whether stderr is a terminal
        quiet = {"disable": None, "delay": 2.0} if progress is None else {}
        self._bar = tqdm(total=total, desc=name, unit="batch", leave=False, **quiet)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
