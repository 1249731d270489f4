"""Every operator against :mod:`flatmin.reference` on this machine, in seconds.

Arguments are made from an operator's schema: each has a maker by its name, below. So a new operator is tested as soon
as it is in the table, and one with an argument that has no maker here fails until it gets one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import _library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDS = 6

#: A scalar, an empty tensor, tails around a vector and a chunk, a matrix in either order, and an image's kernel.
SHAPES: tuple[tuple[int, ...], ...] = ((), (3, 0, 2), (7,), (4097,), (33, 65), (4, 3, 5, 5))

#: What each option is drawn from, by name. Gamma and eps keep the neighbourhood of a weight positive.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "adam_eps": (1e-3,),
    "amsgrad": (False, True),
    "beta1": (0.9, 0.5),
    "beta2": (0.999, 0.5),
    "dampening": (0.0, 0.25),
    "decay": (0.75, 0.5),
    "decoupled": (False, True),
    "eps": (0.25, 1e-3),
    "eta": (0.01, 0.5),
    "first_step": (False, True),
    "gamma": (0.5, 0.1),
    "law": (reference.UNIFORM, reference.NORMAL, reference.TRUNCATED, reference.RADEMACHER),
    "lipschitz_decay": (0.1, 0.5),
    "classes": (10, 1000),
    "count": (3,),
    "ignore_index": (-100,),
    "inner": (4, 40),
    "maximize": (False, True),
    "min_step": (0.0, 0.125),
    "momentum": (0.0, 0.9),
    "nesterov": (False, True),
    "q": (2.0, 1.0, 3.0, math.inf),
    "scaling": (reference.NONE, reference.ASAM, reference.DAVDA54, reference.BIG_VISION),
    "source": (reference.SQUARE, reference.PLAIN, reference.PROBED),
    "source_scale": (1.0, 0.5),
    "offset": (0, 1),
    "span": (1, 9),
    "threshold": (2**32, 2**30, 12_345),
    "weight_decay": (0.0, 0.1),
    "whole": (False, True),
}

#: What an operator does not take: ties share the radius of q = inf, and a cut needs a size.
EXCEPT: dict[str, dict[str, tuple[Any, ...]]] = {
    "sam_norm_ascend_": {"q": (math.inf,)},
    "probe_": {"law": (reference.TRUNCATED,)},
    "draw_samples": {"law": (reference.TRUNCATED,)},
}


@dataclass
class Case:
    """One call of one operator: a type, options, and what has been made for it. `tests/support/raw_arguments.py`
    derives its own from it, with other shapes and values."""

    operator: str
    dtype: torch.dtype
    rng: random.Random
    shapes: Sequence[tuple[int, ...]] = SHAPES
    options: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def values(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Values of either sign, from 1/4 to 2 in magnitude: no result hangs on a difference of nearly equal ones."""
        generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        size = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.75 + 0.25
        return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size).to(dtype)

    def tensors(self, layout: str = "mixed", dtype: torch.dtype | None = None) -> list[Tensor]:
        """One tensor of each shape; "mixed": matrices transposed, images in channels_last, vectors with gaps."""
        made = [self.values(shape, dtype or self.dtype) for shape in self.shapes]
        return [self.laid_out(t) for t in made] if layout == "mixed" else made

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values with the strides of "mixed"."""
        return _strided(t)

    def positive(self) -> list[Tensor]:
        return [t.abs() for t in self.tensors()]

    def params(self) -> list[Tensor]:
        """None in half of the averages of wide types, and in all of 16-bit ones: then there is no quotient."""
        average_alone = self.operator == "curvature_" and (self.dtype.itemsize == 2 or self.rng.random() < 0.5)
        return [] if average_alone else self.tensors()

    def either(self) -> list[Tensor]:
        """The parameters' layout and type, or another layout and float32."""
        return self.tensors() if self.rng.random() < 0.5 else self.tensors("contiguous", torch.float32)

    def maybe(self) -> list[Tensor]:
        """The same, or none."""
        return self.either() if self.rng.random() < 0.5 else []

    def curvatures(self) -> list[Tensor]:
        """None in half of the cases where they are an option. A base step cannot learn them for 16-bit weights, which
        are too few bits for its displacement, and small displacements would magnify the rounding of the step."""
        learned = self.operator.startswith("restore_")
        if learned:
            self.options["min_step"] = 0.125
        optional = learned or self.operator == "scaled_noise_"
        if optional and (self.rng.random() < 0.5 or (learned and self.dtype.itemsize == 2)):
            return []
        return [t.abs() for t in self.either()]

    def sizes(self) -> list[Tensor]:
        """None where there are curvatures, and in half of the other cases."""
        return [t.abs() for t in self.either()] if not self.made["curvatures"] and self.rng.random() < 0.5 else []

    def lipschitz(self) -> list[Tensor]:
        """Of the curvatures' type, or none."""
        curvatures = self.made["curvatures"]
        return [t.to(curvatures[0].dtype) for t in self.positive()] if curvatures and self.rng.random() < 0.5 else []

    def backup(self) -> Tensor:
        """The bytes of other parameters, each from a multiple of the alignment on."""
        nbytes = reference.backup_nbytes(self.made["params"])
        backup, start = torch.full((nbytes,), 0xA5, dtype=torch.uint8), 0
        for p in self.made["params"]:
            raw = self.values((p.numel(),), p.dtype).view(torch.uint8)
            backup[start : start + raw.numel()] = raw
            start += reference.backup_nbytes([p])
        return backup

    def norm(self) -> Tensor:
        """As the operator itself would have it: ties and q = inf compare with it exactly."""
        weights = self.made["params" if "params" in self.made else "weights"]
        gradients = self.made["grads" if "grads" in self.made else "tensors"]
        q = self.options.get("q", math.inf)
        return reference.norm(gradients, weights, q, self.options["scaling"], self.options["eta"])


def _strided(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return t.t().contiguous().t()
    if t.dim() == 4:
        return t.to(memory_format=torch.channels_last)
    return torch.stack([t, t], dim=-1)[..., 0] if t.dim() == 1 else t


def _scalar(value: float) -> Callable[[Case], Tensor]:
    return lambda _: torch.tensor(value, dtype=torch.float64)


def _key(case: Case) -> Tensor:
    """Of a probe or a draw. An ascent gets none: stochastic rounding is a choice that only the kernels make."""
    return torch.tensor([] if "rho" in case.made else [2**63 + 11, 3 << 32 | 5], dtype=torch.uint64)


def _only_if(option: str, make: Callable[[Case], list[Tensor]]) -> Callable[[Case], list[Tensor]]:
    return lambda case: make(case) if case.options[option] else []


#: Tensors by the name of the argument, made in the order of the schema.
TENSORS: dict[str, Callable[[Case], Tensor | list[Tensor]]] = {
    "a": Case.tensors,
    "b": Case.either,
    "c": Case.either,
    "coefficients": lambda _: torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64),
    "d": Case.maybe,
    "backup": Case.backup,
    "bounds": lambda _: torch.empty(0, dtype=torch.int64),
    "corrections": lambda _: torch.tensor([2.0, 1.5], dtype=torch.float64),
    "curvature_scale": _scalar(1.5),
    "curvatures": Case.curvatures,
    "exp_avg_sqs": Case.positive,
    "exp_avgs": Case.tensors,
    "grads": lambda case: case.tensors() if case.operator == "blend_" else case.either(),  # it is written there
    "index": lambda _: torch.tensor([2**40, 7, 7]),
    "key": _key,
    "labels": lambda case: torch.where(case.values((3, 40), torch.float32) < 0.5, -100, torch.arange(40) % 10),
    "lipschitz": Case.lipschitz,
    "lipschitz_constant": _scalar(0.5),
    "lr": _scalar(0.5),
    "max_exp_avg_sqs": _only_if("amsgrad", Case.positive),
    "momentum_buffers": _only_if("momentum", Case.tensors),
    "norm": Case.norm,
    "out": lambda _: torch.zeros(3, 40, dtype=torch.int64),
    "params": Case.params,
    "rho": _scalar(0.7),
    "scale": _scalar(0.5),
    "sizes": Case.sizes,
    "sources": Case.either,
    "steps": lambda case: [torch.tensor(float(i)) for i in range(len(case.shapes))],
    "targets": lambda _: torch.empty(0, dtype=torch.int64),
    "tensors": Case.tensors,
    "weights": Case.tensors,
    "x": Case.either,
    "y": Case.maybe,
}


@dataclass
class Result:
    """How an operator did on a device: calls that agree, and what went wrong first."""

    operator: str
    device: str
    calls: int = 0
    failure: str | None = None


def arguments_of(
    case: Case,
    schema: torch.FunctionSchema,
    makers: Mapping[str, Callable[[Case], Tensor | list[Tensor]]] = TENSORS,
) -> list[Any]:
    """Arguments in the order of the schema; ``LookupError`` for a name that has no maker."""
    excluded = EXCEPT.get(case.operator, {})
    for argument in schema.arguments:
        if argument.name in OPTIONS:
            choices = [value for value in OPTIONS[argument.name] if value not in excluded.get(argument.name, ())]
            case.options[argument.name] = case.rng.choice(choices)
        elif argument.name not in makers:
            raise LookupError(f"the self-test has no value for its argument {argument.name!r} (flatmin/_selftest.py)")
    if case.options.get("nesterov") and not case.options["momentum"]:
        case.options["nesterov"] = False
    for argument in schema.arguments:
        if argument.name in makers:
            case.made[argument.name] = makers[argument.name](case)
    return [{**case.options, **case.made}[argument.name] for argument in schema.arguments]


def _twin(value: Any, device: str) -> Any:
    """A copy on ``device`` with the same strides; counters of steps stay where they are."""
    if isinstance(value, list):
        return [_twin(t, device) for t in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _tolerance(want: Tensor, dtype: torch.dtype, draws: bool) -> Tensor:
    """Rounding errors of a few hundred operations, a power among them, relative to the largest value. Draws are
    float32 for every type. A 16-bit type adds the distance to its next value."""
    narrow = dtype != torch.float64 or draws
    unit = 2.0**-23 if narrow else 2.0**-43
    largest = want.abs().nan_to_num(0.0, 0.0, 0.0).amax() if want.numel() else want.new_zeros(())
    stored = torch.finfo(want.dtype).eps
    return (256 * unit) * torch.maximum(largest, torch.ones_like(largest)).double() + want.abs().double() * stored


def _difference(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, draws: bool) -> str | None:
    """What two lists of tensors differ in, or None."""
    for g, w in zip(got, want, strict=True):
        if g.dtype != w.dtype or g.shape != w.shape:
            return f"{g.dtype} {list(g.shape)} where the reference has {w.dtype} {list(w.shape)}"
        if not w.is_floating_point():
            wrong, what = g != w, "bytes"
        else:
            apart = (g.double() - w.double()).abs()
            wrong, what = ~((apart <= _tolerance(w, dtype, draws)) | (g == w) | (g.isnan() & w.isnan())), "elements"
        if wrong.any():
            at = int(wrong.flatten().nonzero()[0])
            pair = f"{g.flatten()[at].item():.9g} where the reference has {w.flatten()[at].item():.9g}"
            return f"{int(wrong.sum())} of {w.numel()} {what} of a {list(w.shape)} tensor differ: {pair}"
    return None


def _check(case: Case, operator: Any, device: str) -> str | None:
    """One call on ``device`` beside the reference on the CPU: results and everything that is written."""
    arguments = arguments_of(case, operator._schema)
    names = [argument.name for argument in operator._schema.arguments]
    given = [_twin(value, "cpu" if name == "steps" else device) for name, value in zip(names, arguments, strict=True)]
    expected = [_twin(value, "cpu") for value in arguments]
    result, wanted = operator(*given), getattr(reference, case.operator)(*expected)
    got = [t.cpu() for t in _tensors([result, *given])]
    draws = "law" in case.options
    return _difference(got, list(_tensors([wanted, *expected])), case.dtype, draws)


def run(devices: Sequence[str], operators: Mapping[str, Any] | None = None) -> Iterator[Result]:
    """Each operator on each device, as soon as it is done: every type, and options drawn ``ROUNDS`` times."""
    for device in devices:
        for name, operator in (_library.OPERATORS if operators is None else operators).items():
            result = Result(name, device)
            for dtype in DTYPES:
                if dtype in EXCEPT.get(name, {}).get("dtype", ()):
                    continue
                for i in range(ROUNDS):
                    case = Case(name, dtype, random.Random(f"{name} {dtype} {i}"))
                    try:
                        with torch.no_grad():
                            wrong = _check(case, operator, device)
                    except Exception as error:  # whatever it is, the operator does not work here
                        wrong = " ".join(f"{type(error).__name__}: {error}".split())
                    if wrong is not None:
                        options = ", ".join(f"{key}={value}" for key, value in case.options.items())
                        result.failure = f"{str(dtype).removeprefix('torch.')}, {options or 'no options'}: {wrong}"
                        break
                    result.calls += 1
                if result.failure is not None:
                    break
            yield result
