"""Inputs and bounds that the operator tests share: tensors of every type and layout, lists of them, rounding errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drawing import st
from flatmin import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
P_NORMS = (1.0, 1.02, 1.5, 2.0, 3.0, math.inf)
ADAPTIVE = (False, "asam", "davda54", "big_vision")

#: Lengths around what a kernel treats as a unit: a vector (4 to 32), a buffer of 1024, a chunk of 4096.
TAILS = (0, 1, 2, 3, 5, 15, 16, 17, 31, 33, 127, 129, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8193)


# ---- memory ----


def twin(t: Tensor) -> Tensor:
    """A copy with the strides, the offset and the surrounding memory of ``t``."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        memory(t).clone().untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


def twins(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [twin(t) for t in tensors]


def memory(t: Tensor) -> Tensor:
    """Every byte that ``t`` can reach, with the gaps between its elements: a uint8 view, not a copy."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def same_memory(a: Tensor, b: Tensor) -> bool:
    return torch.equal(memory(a), memory(b))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit of every element: tells -0 from 0 and one NaN from another."""
    return a.dtype == b.dtype and torch.equal(*(t.view(_INTEGER[t.element_size()]) for t in (a, b)))


def gaps(t: Tensor) -> Tensor:
    """The bytes of ``t``'s memory that are no element of ``t``."""
    cover = twin(t)
    memory(cover).zero_()
    cover.view(_INTEGER[t.element_size()]).fill_(-1)
    return memory(t)[memory(cover) == 0]


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- layouts: a new tensor of a shape whose strides differ ----


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _transposed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(tuple(reversed(shape)), dtype=dtype).permute([*reversed(range(len(shape)))])


def _channels_last(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    t = torch.zeros(shape, dtype=dtype)
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def _every_second(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Elements with gaps between them."""
    return torch.zeros((*shape, 2), dtype=dtype)[..., 1]


def _corner(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A block of a larger tensor: rows are dense, with gaps between them, and nothing is aligned."""
    block = torch.zeros([n + 3 for n in shape], dtype=dtype)
    return block[tuple(slice(1, n + 1) for n in shape)]


LAYOUTS: dict[str, Callable[[Sequence[int], torch.dtype], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "every_second": _every_second,
    "corner": _corner,
}


# ---- values ----


def fill(t: Tensor, seed: int, *, coarse: bool = False, scale: float = 1.0) -> Tensor:
    """Random values in place: normal, or (``coarse``) eighths in [-4, 4], among which zeros and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    if coarse:
        values = torch.randint(-32, 33, t.shape, generator=generator) / 8
    else:
        values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
    return t.copy_(values * scale)


def filled(shape: Sequence[int], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    return fill(LAYOUTS[layout](shape, dtype), seed)


# ---- problems: lists as an operator takes them ----


@dataclass
class Problem:
    """Parameters, gradients, and the type of the optimizer state that goes with each parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    state_dtypes: list[torch.dtype]
    seed: int

    def copy(self) -> Problem:
        return Problem(twins(self.params), twins(self.grads), self.state_dtypes, self.seed)

    def state(self, salt: int, *, positive: bool = False) -> list[Tensor]:
        """One buffer per parameter, as an optimizer makes it: the parameter's strides where these are dense."""
        buffers = []
        for i, (p, dtype) in enumerate(zip(self.params, self.state_dtypes, strict=True)):
            buffer = fill(torch.zeros_like(p, dtype=dtype), self.seed + 7919 * salt + i)
            buffers.append(buffer.abs_() if positive else buffer)
        return buffers

    def backup(self) -> Tensor:
        """A backup whose unused bytes are known."""
        return ops.backup_like(self.params).fill_(0xA5)


_SHAPES = st.one_of(
    st.sampled_from([(), (3, 0, 2), (1, 1), (2, 3, 1, 1)]),
    st.sampled_from(TAILS).map(lambda n: (n,)),
    st.tuples(st.integers(1, 9), st.integers(1, 600)),
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
)


@st.composite
def _rows(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.dtype, torch.dtype, torch.dtype, str, str]:
    dtype = draw(st.sampled_from(DTYPES))
    companions = st.sampled_from((dtype, torch.float32))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    grad_layout = draw(st.one_of(st.just(layout), st.sampled_from(sorted(LAYOUTS))))
    return draw(_SHAPES), dtype, draw(companions), draw(companions), layout, grad_layout


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One to five tensors, each of its own shape, type and strides."""
    rows = draw(st.lists(_rows(), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**31))
    coarse = draw(st.booleans())
    scale = draw(st.sampled_from([1.0, 1e-3, 100.0]))
    problem = Problem([], [], [], seed)
    for i, (shape, dtype, grad_dtype, state_dtype, layout, grad_layout) in enumerate(rows):
        problem.params.append(fill(LAYOUTS[layout](shape, dtype), seed + 2 * i, coarse=coarse))
        grad = LAYOUTS[grad_layout](shape, grad_dtype)
        problem.grads.append(fill(grad, seed + 2 * i + 1, coarse=coarse, scale=scale))
        problem.state_dtypes.append(state_dtype)
    return problem


def large_problem(dtype: torch.dtype) -> Problem:
    """Above 100 000 elements in one tensor: more chunks than a thread takes at once, and a tail."""
    params = [filled((100_003,), dtype, 1), filled((63, 65), dtype, 2)]
    grads = [filled((100_003,), dtype, 3), filled((63, 65), dtype, 4)]
    return Problem(params, grads, [dtype, dtype], 5)


# ---- rounding ----


def arithmetic_eps(dtype: torch.dtype) -> float:
    """The spacing at 1 of the type in which a parameter of this type is updated."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def storage_error(t: Tensor) -> Tensor:
    """What rounding to a 16-bit type can add to a difference of two results: one unit in the last place of ``t``.

    Both sides round once, to neighbours at most one apart. 0 for the types that are stored as computed.
    """
    if t.element_size() > 2:
        return torch.zeros(t.shape, dtype=torch.float64)
    info = torch.finfo(t.dtype)
    exponent = torch.frexp(t.double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full(t.shape, info.eps, dtype=torch.float64), exponent)


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """``|got - want| <= bound`` (float64) and one unit in the last place of a 16-bit type; equal where not finite."""
    assert got.dtype == want.dtype
    a, b = got.double(), want.double()
    finite = b.isfinite()
    assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    smallest = torch.finfo(torch.float64).tiny if got.dtype == torch.float64 else 2.0**-149
    excess = (a - b).abs() - (bound + storage_error(want) + smallest)
    worst = excess[finite].max().item() if finite.any() else -1.0
    assert worst <= 0.0, f"the bound is exceeded by {worst:.3g}"
