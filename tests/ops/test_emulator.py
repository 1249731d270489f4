"""The CUDA kernels against the C kernels, on the CPU: the same bytes from every call, in every order of threads.

``make ctest`` builds ``_C_emu.so``: the CUDA backend as it is, with tests/emu in place of the device, registered as
``torch.ops.flatmin_emu`` for CPU tensors. The operator tests of the CPU run here once more. Each operator call that
they make goes to the C kernels and, on copies of all memory, to the emulated kernels in each order; every byte that the
arguments can reach, the result and the error must be the same. The test then goes on with the emulated result.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import test_bits
import test_labels
import test_ops
import test_ops_errors
import test_ops_linear
import test_ops_noise
import test_ops_steps
import test_own_numbers
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import bits_digest
from flatmin import ops
from flatmin.ops import _library
from problems import DTYPES, filled, same_bytes, same_memory
from requirements import LAUNCH_ROWS

LIBRARY = Path(os.environ.get("FLATMIN_EMULATOR", Path(__file__).parents[2] / "build" / "tests" / "_C_emu.so"))
if not LIBRARY.exists():
    raise FileNotFoundError(f"{LIBRARY}: run `make ctest`, which builds it, or set FLATMIN_EMULATOR to where it is")
torch.ops.load_library(LIBRARY)
emulator = ctypes.CDLL(str(LIBRARY))
emulator.fm_emu_launches.restype = ctypes.c_int64

ORDERS = ("forward", "reverse", "random")
_seeds = itertools.count()


def set_order(order: str) -> None:
    """ "random" is another one each time, and the same ones in each run."""
    name = f"{order}:{next(_seeds)}" if order == "random" else order
    assert emulator.fm_emu_set_order(name.encode())


# ---- one call, all kernels ----

Arguments = tuple[Any, ...]


def copied(args: Arguments) -> Arguments:
    """The same in memory of its own: tensors that share memory still do, and gaps between elements are copied too."""
    memo: dict[int, Any] = {}
    copies: Arguments = tree_map_only(
        Tensor, lambda t: copy.deepcopy(t, memo) if t.layout == torch.strided else t.clone(), args
    )
    return copies


def assert_same_memory(got: Any, want: Any, where: str) -> None:
    """Every byte of every tensor's storage, whether the tensor covers it or not."""
    for i, (a, b) in enumerate(zip(tree_leaves(got), tree_leaves(want), strict=True)):
        if isinstance(a, Tensor) and a.layout == torch.strided:
            assert a.dtype == b.dtype and same_memory(a, b), f"{where}: tensor {i} differs"


class AllKernels:
    """What takes the place of ``flatmin._library.OPERATORS[name]``."""

    def __init__(self, name: str) -> None:
        self.c = getattr(torch.ops.flatmin, name).default
        self.cuda = getattr(torch.ops.flatmin_emu, name).default
        self._schema = self.c._schema

    def __call__(self, *args: Any) -> Tensor | None:
        expected_args = copied(args)
        try:
            expected = self.c(*expected_args)
        except RuntimeError:
            self.refuse(args)
        for order in ORDERS:
            set_order(order)
            got_args = args if order == ORDERS[-1] else copied(args)
            got: Tensor | None = self.cuda(*got_args)
            assert_same_memory((got, got_args), (expected, expected_args), order)
        return got

    def refuse(self, args: Arguments) -> NoReturn:
        """Both refuse with one message. It may depend on addresses, so here they get the same memory."""
        before = copied(args)
        with pytest.raises(RuntimeError) as expected:
            self.c(*args)
        if str(expected.value).startswith(("rho:", "scale:", "lipschitz_constant:", "labels: element", "index[")):
            raise expected.value  # the host never reads a value on a device: only the C kernels can refuse it
        with pytest.raises(RuntimeError) as caught:
            self.cuda(*args)
        assert str(caught.value) == str(expected.value)
        assert_same_memory(args, before, "refused")
        raise caught.value


#: Fewer examples than on the CPU: each runs four times, three of them a fiber for each CUDA thread. What an example can
#: be is the same, and the fixed inputs below and in tests/emu reach every form of every update.
settings.register_profile("emulator", settings.get_profile("flatmin"), max_examples=12)


@pytest.fixture(scope="module", autouse=True)
def all_kernels() -> Iterator[None]:
    settings.load_profile("emulator")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the emulator has one, and the others of torch would spin meanwhile
    with pytest.MonkeyPatch.context() as patch:
        for name in _library.OPERATORS:
            patch.setitem(_library.OPERATORS, name, AllKernels(name))
        yield
    torch.set_num_threads(threads)
    settings.load_profile("flatmin")


# ---- the tests of the CPU ----

#: Tests of something else than what a kernel computes.
LEFT_OUT = {
    "test_cpu_tensors_run_the_c_kernels",
    "test_devices_do_not_mix",  # shape functions
    "test_same_bits_on_every_instruction_set",
    "test_same_bits_on_any_number_of_threads",
    "test_an_unknown_instruction_set_is_an_error",
    "test_streaming_stores_give_the_same_bits",
    "test_stochastic_rounding_is_unbiased",  # statistics of 80 million elements; the bits are compared by the others
    "test_many_small_steps_arrive",
    "test_pacgen_loses_no_digit",  # 4 million elements; the C tests' long rows cover the folds
}
for _suite in (
    test_ops,
    test_ops_linear,
    test_ops_steps,
    test_own_numbers,
    test_ops_noise,
    test_ops_errors,
    test_bits,
    test_labels,
):
    for _name, _test in list(vars(_suite).items()):
        if _name.startswith("test_") and _name not in LEFT_OUT:
            assert _name not in globals(), f"two tests have the name {_name}"
            globals()[_name] = _test


# ---- the emulator in use ----


def test_the_cuda_kernels_run() -> None:
    """Without this the comparisons could compare the C kernels with themselves, or look for no races."""
    assert torch.ops.flatmin_emu.isa() == 0
    assert emulator.fm_emu_checks_races()
    before = emulator.fm_emu_launches()
    ops.norm([torch.ones(3)])
    assert emulator.fm_emu_launches() == before + 2 * len(ORDERS)  # the chunks, then their fold


def test_every_operator_has_a_cuda_kernel() -> None:
    emulated = _library.operators("flatmin_emu")
    assert emulated.keys() == _library.OPERATORS.keys()
    for name, operator in emulated.items():
        assert str(operator._schema) == str(_library.OPERATORS[name]._schema).replace("flatmin::", "flatmin_emu::")


@pytest.mark.parametrize("order", ORDERS)
def test_a_race_is_an_error(order: str) -> None:
    """The real kernels without their barriers: what a forgotten one would look like."""
    tensors = [torch.ones(5000)]
    set_order(order)
    emulator.fm_emu_omit_barriers(True)
    try:
        with pytest.raises(RuntimeError, match="CUDA emulator: fm_fold_kernel: race: thread"):
            torch.ops.flatmin_emu.norm(tensors, [], 2.0, 0, 0.0)
    finally:
        emulator.fm_emu_omit_barriers(False)
    assert torch.ops.flatmin_emu.norm(tensors, [], 2.0, 0, 0.0) == torch.ops.flatmin.norm(tensors, [], 2.0, 0, 0.0)


# ---- inputs that only a GPU treats apart ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_inputs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs whose digests must not depend on the instruction set: the longest of 10 chunks instead of 74."""
    monkeypatch.setattr(bits_digest, "LENGTHS", (0, 1, 7, 33, 1025, 4097, 40_001))
    monkeypatch.setattr(bits_digest, "_inputs", bits_digest._inputs.__wrapped__)  # its cache is for the long ones
    for group in bits_digest.GROUPS:
        assert len(group(dtype)) >= 3 or group is bits_digest.samples


@pytest.mark.parametrize("count", [LAUNCH_ROWS - 1, LAUNCH_ROWS, LAUNCH_ROWS + 1, 2 * LAUNCH_ROWS + 50])
def test_more_tensors_than_one_launch_carries(count: int) -> None:
    """A launch takes LAUNCH_ROWS dense tensors, or one with strides. Random bits go by the number in the whole list."""

    def tensors(seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        layouts = ["every_second" if i == 200 else "contiguous" for i in range(count)]
        return [
            filled((1 + i % 5, 1 + i % 3), dtype or DTYPES[i % 4], seed + i, layout) for i, layout in enumerate(layouts)
        ]

    params, grads, buffers = tensors(1), tensors(1000), tensors(2000, torch.float32)
    backup, key = ops.backup_like(params), torch.tensor([5, 9], dtype=torch.uint64)
    start = copy.deepcopy(params)
    norm = ops.norm(grads, params, adaptive="asam")
    ops.sam_ascend_(params, grads, backup, norm, 0.5, adaptive="asam", key=key)
    assert sum(not torch.equal(p, w) for p, w in zip(params, start, strict=True)) > count // 2
    ops.restore_sgd_(params, grads, buffers, backup, 0.1, momentum=0.9)
    steps = [torch.tensor(float(i)) for i in range(count)]
    squares = [b.abs() for b in buffers]
    ops.restore_adam_(params, grads, buffers, squares, [], steps, backup, 0.1)
    ops.restore_(params, backup)
    assert all(same_bytes(p, w) for p, w in zip(params, start, strict=True))


@pytest.mark.parametrize(("count", "launches"), [(213, 1), (LAUNCH_ROWS, 1), (LAUNCH_ROWS + 1, 2)])
def test_one_launch_a_pass(count: int, launches: int) -> None:
    """213 are EfficientNet-B0's tensors."""
    params, grads = [torch.ones(5) for _ in range(count)], [torch.ones(5) for _ in range(count)]
    backup, scale = ops.backup_like(params), torch.ones((), dtype=torch.float64)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("sam_ascend_", (grads, backup, scale, scale, torch.empty(0, dtype=torch.uint64), 2.0, 0, 0.0, 0.0)),
        (
            "restore_sgd_",
            (grads, [], backup, scale, 0.0, 0.0, 0.0, False, False, False, [], [], scale, 0.0, 0.0, 0.0),
        ),
        ("restore_", (backup,)),
    ]
    for name, args in calls:
        before = emulator.fm_emu_launches()
        getattr(torch.ops.flatmin_emu, name)(params, *args)
        assert emulator.fm_emu_launches() - before == launches, name
