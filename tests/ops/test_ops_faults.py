"""Arguments that once crashed a kernel, or were taken for what they are not. `make fuzz` found most of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flatmin import ops
from flatmin.ops import _library
from operator_arguments import OPERATORS, Arguments, call, good, lists_of, scalar
from problems import memory

LISTS = [(op, name) for op in OPERATORS for name in lists_of(op)]
SINGLE = [(op, a.name) for op in OPERATORS for a in _library.OPERATORS[op]._schema.arguments if str(a.type) == "Tensor"]


def refuse(op: str, arguments: Arguments, *message: str) -> None:
    """The call raises with these words, and every byte that is there stays."""
    tensors = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    seen = [t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    before = [memory(t).clone() for t in seen]
    with pytest.raises(RuntimeError) as caught:
        call(op, arguments)
    assert all(part in str(caught.value) for part in message), str(caught.value)
    assert all(torch.equal(memory(t), old) for t, old in zip(seen, before, strict=True))


def without_memory(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def misaligned(t: Tensor) -> Tensor:
    size = t.element_size()
    return torch.frombuffer(bytearray(t.numel() * size + size), dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)


# ---- one tensor of a list ----


@pytest.mark.parametrize(("op", "name"), LISTS)
def test_a_tensor_without_memory(op: str, name: str) -> None:
    """As FSDP leaves parameters between two passes: sizes, and nothing behind them."""
    arguments = good(op)
    arguments[name][2] = without_memory(arguments[name][2])
    refuse(op, arguments, f"{name}[2] has no memory")


@pytest.mark.parametrize(("op", "name"), LISTS)
def test_memory_that_begins_between_elements(op: str, name: str) -> None:
    """A compiler counts on aligned elements, and may then load or store as only aligned ones can be."""
    arguments = good(op)
    arguments[name][2] = misaligned(arguments[name][2])
    refuse(op, arguments, f"{name}[2] does not begin at a multiple of 4 bytes", "t.clone()")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_elements_than_memory(dtype: torch.dtype) -> None:
    """An expanded tensor has them; the number of bytes overflowed."""
    params = [torch.zeros((), dtype=dtype).expand(2**61), torch.zeros(3, dtype=dtype)]
    refuse("save_", {"params": params, "backup": torch.zeros(64, dtype=torch.uint8)}, "params[0]", str(2**61))
    refuse("norm", good("norm") | {"tensors": params, "scaling": 0}, "tensors[0]", "more than there is memory")


NONE_OF_MANY = {
    "product overflows": ((2**61, 4, 0), (4, 1, 1)),
    "strides overflow": ((0, 2**40, 3), (1, 2**61, 7)),
    "strides of dimensions that merge": ((3, 0, 2**58), (2**62, 2**62, 2**62)),
}


@pytest.mark.parametrize("case", NONE_OF_MANY)
def test_no_elements_in_sizes_that_overflow(case: str) -> None:
    empty = torch.empty(0).as_strided(*NONE_OF_MANY[case])
    assert ops.norm([empty, torch.ones(4)]).item() == 2.0
    backup = ops.backup_like([empty, torch.ones(4)])
    ops.restore_([empty, torch.ones(4)], backup)


def test_more_filters_than_memory() -> None:
    """Each index of the first dimension is a row: the bytes of the rows overflowed, and what was asked for was less."""
    for count in (2**57, 2**62):
        tensors = [torch.empty(0).as_strided((count, 0), (1, 1)) for _ in range(3)]
        refuse("filter_norm", {"tensors": tensors, "whole": False}, "out of memory")
    assert call("filter_norm", {"tensors": tensors, "whole": True}).tolist() == [0.0, 0.0, 0.0]


# ---- shared memory ----


def test_a_narrow_element_within_a_wide_one() -> None:
    """Of 8 bytes the two outer ones were looked at."""
    raw = torch.zeros(128, dtype=torch.uint8)
    narrow = raw.view(torch.bfloat16)[1::4]  # bytes 2, 3 of every 8
    wide = raw.view(torch.float64)[1::2]
    params = [narrow, wide]
    grads = [torch.ones(t.shape, dtype=t.dtype) for t in params]
    given = {"params": params, "grads": grads, "backup": ops.backup_like(params)}
    refuse("sam_ascend_", good("sam_ascend_") | given, "params[0]", "params[1]", "share memory")


def test_parameters_within_their_backup() -> None:
    """They would be copied onto themselves, from where they overlap."""
    backup = torch.zeros(128, dtype=torch.uint8)
    refuse("save_", {"params": [backup.view(torch.float32)[4:24]], "backup": backup}, "params[0]", "share memory")


# ---- single tensors ----


@pytest.mark.parametrize("op", [op for op in OPERATORS if "corrections" in _library.ARGUMENTS[op]])
@pytest.mark.parametrize("stride", [0, 5])
def test_numbers_along_another_dimension(op: str, stride: int) -> None:
    """Two numbers of a column: the elements behind the first were read, be they of the tensor or not."""
    column = torch.ones(1 + stride, dtype=torch.float64).as_strided((2, 1), (stride, 1))
    refuse(op, good(op) | {"corrections": column}, "corrections must be a contiguous float64 tensor of 2 elements")


@pytest.mark.parametrize(("op", "name"), SINGLE)
def test_a_single_tensor_without_memory(op: str, name: str) -> None:
    arguments = good(op)
    if arguments[name].numel() > 0:  # a kernel may do without one that is empty
        arguments[name] = without_memory(arguments[name])
        refuse(op, arguments, f"{name} has no memory")


@pytest.mark.parametrize(("op", "name"), SINGLE)
def test_a_single_meta_tensor(op: str, name: str) -> None:
    """It sends the call to the shape function, which said nothing, and nothing was done."""
    arguments = good(op)
    arguments[name] = arguments[name].to("meta")
    refuse(op, arguments, "different devices")


@pytest.mark.parametrize("op", ["axpy_", "restore_sgd_", "restore_adam_", "restore_lion_"])
def test_a_sparse_backup_is_none_that_is_empty(op: str) -> None:
    arguments = good(op)
    arguments["backup"] = arguments["backup"].to_sparse()
    refuse(op, arguments, "backup is sparse")


def test_a_backup_between_elements() -> None:
    arguments = good("restore_")
    whole = torch.zeros(arguments["backup"].numel() + 1, dtype=torch.uint8)
    refuse("restore_", arguments | {"backup": whole[1:]}, "backup does not begin at a multiple of 4 bytes")


@pytest.mark.parametrize("count", [math.nan, math.inf, -1.0, 1e300, 2.0**63])
def test_counters_that_count_nothing(count: float) -> None:
    """They became an integer."""
    arguments = good("restore_adam_")
    arguments["steps"][2] = torch.tensor(count, dtype=torch.float64)
    refuse("restore_adam_", arguments, "steps[2] is", "counts steps")


def test_a_counter_in_the_memory_of_a_parameter_is_read_once() -> None:
    """It was read again after the step, which had made no count of it: refused, when all was written. It is what is
    written last."""
    p = torch.tensor(3.0)
    ops.restore_adam_([p], [torch.ones(())], [torch.ones(())], [torch.ones(())], [], [p], torch.empty(0).byte(), 100.0)
    assert float(p) == 4.0


def test_a_meta_counter() -> None:
    arguments = good("restore_adam_")
    arguments["steps"][2] = arguments["steps"][2].to("meta")
    refuse("restore_adam_", arguments, "different devices")


# ---- labels ----


def test_more_draws_than_numbers() -> None:
    refuse("draw_samples", good("draw_samples") | {"count": 2**50, "inner": 2**30}, "count", str(2**50))


@pytest.mark.parametrize("at", [0, 11])
def test_a_wrong_label_before_anything_is_written(at: int) -> None:
    arguments: dict[str, Any] = good("corrupt_labels")
    arguments["labels"].view(-1)[at] = 12
    refuse("corrupt_labels", arguments, f"labels: element {at} is 12")


@pytest.mark.parametrize("spoil", [without_memory, misaligned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["labels", "index", "out"])
def test_labels_without_memory_of_their_own(name: str, spoil: Callable[[Tensor], Tensor]) -> None:
    arguments = good("corrupt_labels")
    arguments[name] = spoil(arguments[name])
    refuse("corrupt_labels", arguments, name)


def test_scalars_between_elements() -> None:
    refuse("sam_ascend_", good("sam_ascend_") | {"norm": misaligned(scalar(1.0))}, "norm does not begin")
