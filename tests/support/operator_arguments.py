"""One good call of each raw operator, by name: the row that a new operator adds to the tests of all of them.

Names, kinds and what is written come from the schemas, of which torch keeps the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin import ops
from flatmin.ops import _library
from problems import filled

Arguments = dict[str, Any]

OPERATORS = sorted(_library.OPERATORS)
SHAPE = (6, 5)


def scalars(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def positive(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    return [filled(shape, torch.float32, seed + i).abs_() for i, shape in enumerate(shapes)]


#: What every restore-and-step operator takes beside the step.
AVERAGES: dict[str, Any] = {"decay": 0.9, "lipschitz_decay": 0.1, "min_step": 1e-8}

#: For each operator the single arguments, and the lists that are no tensors like the parameters.
_SINGLE: dict[str, Callable[[], Arguments]] = {
    "norm": lambda: {"q": 2.0, "scaling": 1, "eta": 0.01},
    "ties": lambda: {"norm": scalar(3.0), "scaling": 1, "eta": 0.01},
    "sam_ascend_": lambda: {"norm": scalar(3.0), **_ascent()},
    "sam_norm_ascend_": lambda: _ascent(),
    "save_": dict,
    "restore_": dict,
    "restore_lion_": lambda: {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "maximize": False, **_step()},
    "dot": dict,
    "blend_": lambda: {"coefficients": scalars(0.5, -2.0, 3.0)},
    "axpy_": lambda: {"scale": scalar(-0.5)},
    "restore_sgd_": lambda: {
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.01,
        "nesterov": True,
        "maximize": False,
        "first_step": False,
        **_step(),
    },
    "restore_adam_": lambda: {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "decoupled": True,
        "amsgrad": True,
        "maximize": False,
        **_step(),
    },
    "scaled_noise_": lambda: {
        "sizes": [],
        "key": ops.random_key(1),
        "scale": scalar(0.5),
        "law": 2,
        **_neighbourhood(),
    },
    "probe_": lambda: {"key": ops.random_key(1), "law": 3},
    "curvature_": lambda: {
        "key": ops.random_key(1),
        "corrections": scalars(2.0, 1.5),
        "source": 2,
        "source_scale": 1.0,
        **AVERAGES,
    },
    "pacgen": lambda: _neighbourhood(),
    "filter_norm": lambda: {"whole": False},
    "corrupt_labels": lambda: {
        "labels": torch.arange(12).view(3, 4),
        "index": torch.tensor([5, 0, 5]),
        "bounds": torch.empty(0, dtype=torch.int64),
        "targets": torch.empty(0, dtype=torch.int64),
        "key": ops.random_key(1),
        "out": torch.zeros(3, 4, dtype=torch.int64),
        "classes": 12,
        "threshold": 2**31,
        "span": 11,
        "offset": 1,
        "ignore_index": -100,
    },
    "draw_samples": lambda: {
        "index": torch.tensor([5, 0, 5]),
        "key": ops.random_key(1),
        "count": 3,
        "inner": 4,
        "law": 1,
    },
}


def _ascent() -> Arguments:
    return {
        "rho": scalar(0.05),
        "key": torch.empty(0, dtype=torch.uint64),
        "q": 2.0,
        "scaling": 0,
        "eta": 0.01,
        "eps": 1e-12,
    }


def _step() -> Arguments:
    return {"lr": scalar(0.1), "corrections": scalars(2.0, 1.5), **AVERAGES}


def _neighbourhood() -> Arguments:
    return {"lipschitz_constant": scalar(1.0), "curvature_scale": scalar(1.0), "gamma": 0.1, "eps": 0.1}


def good(op: str, shapes: Sequence[tuple[int, ...]] = (SHAPE,) * 4) -> Arguments:
    """Arguments that ``op`` accepts, in the order of its schema. All values of the lists are positive."""
    single = _SINGLE[op]()
    arguments: Arguments = {}
    for i, name in enumerate(_library.ARGUMENTS[op]):
        if name in single:
            arguments[name] = single[name]
        elif name == "steps":
            arguments[name] = [torch.ones(()) for _ in shapes]
        elif name == "backup":
            arguments[name] = ops.backup_like(positive(shapes, 0)).zero_()
        else:
            arguments[name] = positive(shapes, 100 * i)
    assert arguments.keys() >= single.keys(), f"{op}: {single.keys() - arguments.keys()} are not in its schema"
    return arguments


def bound(op: str, arguments: Arguments) -> tuple[Any, ...]:
    """The arguments in the order of the schema."""
    return tuple(arguments[name] for name in _library.ARGUMENTS[op])


def call(op: str, arguments: Arguments) -> Any:
    return _library.OPERATORS[op](*bound(op, arguments))


def lists_of(op: str) -> list[str]:
    """The lists of a schema whose tensors lie beside each other, the first one first.

    ``sizes`` of the noise stands for ``curvatures`` and is not given beside them.
    """
    arguments = _library.OPERATORS[op]._schema.arguments
    every = [a.name for a in arguments if str(a.type) == "List[Tensor]"]
    beside = [name for name in every if name != "steps" and (op, name) != ("scaled_noise_", "sizes")]
    return sorted(beside, key=lambda name: name != "params")  # which is the first one wherever it stands
