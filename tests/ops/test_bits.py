"""The same inputs give the same bits: over instruction sets, threads, chunks and streaming; and the random bits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import bits_digest
from bits_processes import different, digests_under, machine_isas
from flatmin import ops
from problems import filled, same_bytes

# ---- instruction sets and threads ----


def test_same_bits_on_every_instruction_set() -> None:
    isas = machine_isas()
    assert len(isas) >= 2, "this processor runs one table of kernels only: there is nothing to compare"
    for isa in isas[1:]:
        assert different(digests_under("base"), digests_under(isa)) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_on_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    assert different(digests_under("base"), bits_digest.digests()) == []


@pytest.mark.parametrize("isa", ["v5", "avx2", "BASE"])
def test_an_unknown_instruction_set_is_an_error(isa: str) -> None:
    """A typing error in FM_ISA would otherwise test the default kernels again."""
    run = subprocess.run(
        [sys.executable, "-c", "import flatmin.ops"],
        env={**os.environ, "FM_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert f"FM_ISA: '{isa}' given" in run.stderr


# ---- chunks: a tensor's elements do not depend on how many others are beside them ----

#: Cuts on, beside and far from the boundaries of vectors, buffers and chunks.
CUTS = (0, 1, 15, 64, 1023, 1024, 4096, 4097, 9000, 12288, 20_011)


def slices(tensors: list[Tensor]) -> list[Tensor]:
    """The same elements as a list of short tensors, at addresses that are no multiple of a vector."""
    return [t[a:b] for t in tensors for a, b in itertools.pairwise(CUTS)]


def element_wise(cut: Callable[[list[Tensor]], list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """What each element-wise operator makes of one list, given whole or cut."""
    results = []
    for q in (1.0, 1.5, 2.0):
        params, grads = ([filled((CUTS[-1],), dtype, seed)] for seed in (1, 2))
        backup = ops.backup_like(cut(params))
        norm = torch.tensor(3.0, dtype=torch.float64)
        ops.sam_ascend_(cut(params), cut(grads), backup, norm, 2.0, q=q)
        results.append(params[0].clone())
        buffers = [filled((CUTS[-1],), dtype, 3)]
        ops.restore_sgd_(cut(params), cut(grads), cut(buffers), backup, 0.1, momentum=0.9, weight_decay=0.1)
        results += [params[0].clone(), *buffers]
        means, squares = [filled((CUTS[-1],), dtype, 4)], [filled((CUTS[-1],), dtype, 5).abs_()]
        steps = [torch.ones(()) for _ in cut(params)]
        ops.restore_adam_(cut(params), cut(grads), cut(means), cut(squares), [], steps, backup, 0.1)
        results += [params[0].clone(), *means, *squares]
        ops.restore_(cut(params), backup)
        results.append(params[0])
    return results


@pytest.mark.parametrize("dtype", bits_digest.DTYPES)
def test_slices_give_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    whole, cut = element_wise(list, dtype), element_wise(slices, dtype)
    assert all(same_bytes(a, b) for a, b in zip(whole, cut, strict=True))


def test_strides_give_the_same_bits() -> None:
    """Gaps between elements, and gradients in another order, change the path and not the result."""
    w, g = filled((130, 70), torch.float32, 1), filled((130, 70), torch.float32, 2)
    results = []
    for layout in ("contiguous", "transposed", "every_second", "corner"):
        for grad_layout in ("contiguous", "transposed"):
            params = [filled((130, 70), torch.float32, 1, layout)]
            grads = [filled((130, 70), torch.float32, 2, grad_layout)]
            assert torch.equal(params[0], w) and torch.equal(grads[0], g)
            ops.sam_ascend_(params, grads, ops.backup_like(params), torch.tensor(3.0).double(), 2.0, adaptive="asam")
            results.append(params[0].contiguous())
    assert all(same_bytes(r, results[0]) for r in results)


def test_streaming_stores_give_the_same_bits() -> None:
    """Above 128 MiB for weights, gradients, backup and momentum together, stores go past the caches: 9 million floats
    against their two halves, which do not; at an odd address."""
    n, half = 9_000_003, 4_500_001

    def run(cut: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        w, g, m = (bits_digest.values(n + 1, seed, torch.float32)[1:] for seed in (1, 2, 3))
        results = []
        for p, d, b in zip(cut(w), cut(g), cut(m), strict=True):
            backup = ops.backup_like([p])
            ops.sam_ascend_([p], [d], backup, torch.tensor(2.0).double(), 0.5)
            results.append(p.clone())
            ops.restore_([p], backup)
            ops.restore_sgd_([p], [d], [b], backup, 0.1, momentum=0.9)
        return [torch.cat(results), w, m]

    whole, halves = run(lambda t: [t]), run(lambda t: [t[:half], t[half:]])
    assert all(same_bytes(a, b) for a, b in zip(whole, halves, strict=True))


# ---- stochastic rounding ----

Words = npt.NDArray[np.uint64]


def philox(counter: list[Words], key: list[int]) -> list[Words]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), on arrays of 32-bit words."""
    low = np.uint64(2**32 - 1)
    c, k = list(counter), [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [first >> np.uint64(32), second >> np.uint64(32)]
        c = [high[1] ^ c[1] ^ k[0], second & low, high[0] ^ c[3] ^ k[1], first & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """The oracle below is itself held against Random123's published vectors."""
    words = philox([np.array([word], dtype=np.uint64) for word in counter], key)
    assert [int(word[0]) for word in words] == expected


def random_words(n: int, seed: int, step: int, tensor: int) -> Words:
    """The word of each of n elements: lane i % 4 of quad i // 4, counter (quad, stream, tensor, draw), key the seed."""
    quads = np.arange(-(-n // 4), dtype=np.uint64)
    draw, stream = step & (2**32 - 1), step >> 32
    low, high = quads & np.uint64(2**32 - 1), quads >> np.uint64(32) ^ np.uint64(stream << 16)
    counter = [low, high, np.full_like(quads, tensor), np.full_like(quads, draw)]
    return np.stack(philox(counter, [seed & (2**32 - 1), seed >> 32]), axis=1).reshape(-1)[:n]


def round_by_chance(params: list[Tensor], grads: list[Tensor], seed: int, step: int, rho: float = 1.0) -> None:
    """w + rho g, rounded stochastically: a norm of 1 and no eps make the step rho itself."""
    key = torch.tensor([seed, step], dtype=torch.uint64)
    norm = torch.ones((), dtype=torch.float64)
    ops.sam_ascend_(params, grads, ops.backup_like(params), norm, rho, eps=0.0, key=key)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (5, 1), (2**40 + 3, 77), (2**64 - 1, 2**32 - 1), (9, 3 << 32 | 8)])
def test_the_random_bits_are_the_documented_ones(seed: int, step: int) -> None:
    """bf16 rounds up where the 16 bits cut off, plus the upper 16 of the element's word, carry. Every tensor of the
    list has words of its own, an empty one included."""
    lengths = (5000, 0, 3, 1027)
    params = [filled((n,), torch.bfloat16, i) for i, n in enumerate(lengths)]
    grads = [filled((n,), torch.float32, 10 + i) for i, n in enumerate(lengths)]
    exact = [(p.float() + g * 2.0**-5).numpy().view(np.uint32) for p, g in zip(params, grads, strict=True)]
    round_by_chance(params, grads, seed, step, rho=2.0**-5)
    for i, (p, bits) in enumerate(zip(params, exact, strict=True)):
        words = random_words(lengths[i], seed, step, i)
        expected = ((bits.astype(np.uint64) + (words >> np.uint64(16))) >> np.uint64(16)).astype(np.uint16)
        assert np.array_equal(p.view(torch.int16).numpy().view(np.uint16), expected)


def moved(
    dtype: torch.dtype, w: float, fraction: float, seed: int = 1, step: int = 1, n: int = 2**20
) -> tuple[Tensor, float]:
    """n copies of w moved up by a fraction of the distance to the next number, and that distance."""
    start = torch.tensor(w, dtype=dtype)
    unit = (start.view(torch.int16) + 1).view(dtype).double().item() - start.double().item()
    params = [start.expand(n).clone()]
    round_by_chance(params, [torch.full((n,), unit, dtype=torch.float32)], seed, step, rho=fraction)
    return params[0], unit


#: A power of two, where the spacing changes; ordinary numbers of both signs; in fp16 also below 2^-14, where the
#: spacing is 2^-24 throughout, and the largest number below 2^-14.
STARTS = [
    *((dtype, w) for dtype in (torch.bfloat16, torch.float16) for w in (1.0, -1.0, 1.75, -0.3, 200.0)),
    *((torch.float16, w) for w in (2.0**-20, -(2.0**-15), 2.0**-14 - 2.0**-24, 2.0**-14, 6.0 * 2.0**-24)),
]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("dtype", "w"), STARTS)
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, w: float, fraction: float) -> None:
    """The number of draws that round away from w is binomial: within 5 sigma of n times the fraction, and so for each
    of the four words of a random block. Nothing lands elsewhere than on the two neighbours."""
    values, unit = moved(dtype, w, fraction)
    start = torch.tensor(w, dtype=dtype)
    neighbour = start.double() + unit
    assert torch.equal(torch.unique(values).double(), torch.stack([start.double(), neighbour]).sort().values)
    n = values.numel()
    share = (values != start).view(-1, 4).double().mean(0)
    # fp16 keeps 13 random bits: the probability itself is a multiple of 2^-13
    resolution = 2.0**-13
    sigma = math.sqrt(fraction * (1 - fraction) / (n / 4))
    assert (share - fraction).abs().max().item() <= 5 * sigma + resolution
    assert abs(share.mean().item() - fraction) <= 5 * sigma / 2 + resolution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_steps_arrive(dtype: torch.dtype) -> None:
    """What it is for: 100 steps of 1/50 of the spacing move the mean by 2 spacings; to nearest none would move."""
    n, steps, fraction = 2**16, 100, 0.02
    params = [torch.full((n,), 1.25, dtype=dtype)]
    unit = torch.finfo(dtype).eps
    grads = [torch.full((n,), unit)]
    for step in range(steps):
        round_by_chance(params, grads, 3, step, rho=fraction)
    mean = (params[0].double().mean().item() - 1.25) / unit
    sigma = math.sqrt(steps * fraction * (1 - fraction) / n)
    assert abs(mean - steps * fraction) <= 5 * sigma + steps * 2.0**-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_key_decides_the_bits(dtype: torch.dtype) -> None:
    first, _ = moved(dtype, 1.0, 0.5, seed=11, step=4, n=4096)
    assert torch.equal(first, moved(dtype, 1.0, 0.5, seed=11, step=4, n=4096)[0])
    for seed, step in ((12, 4), (11, 5), (11 + 2**32, 4)):
        other, _ = moved(dtype, 1.0, 0.5, seed=seed, step=step, n=4096)
        # independent fair bits agree in half of 4096 places, sigma 32
        assert abs((first == other).sum().item() - 2048) <= 5 * 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_results_and_non_finite_ones_do_not_move(dtype: torch.dtype) -> None:
    """What is a number of the type already stays it, whatever the draw; infinities and NaN stay what they are."""
    special = [0.0, -0.0, 1.0, -2.5, torch.finfo(dtype).max, torch.inf, -torch.inf, torch.nan]
    start = torch.tensor(special * 512, dtype=dtype)
    params = [start.clone()]
    round_by_chance(params, [torch.zeros(start.shape)], 1, 1)
    assert torch.equal(params[0].nan_to_num(7.0), start.nan_to_num(7.0))
    assert torch.equal(params[0].isnan(), start.isnan())


def test_wide_parameters_ignore_the_key() -> None:
    for dtype in (torch.float32, torch.float64):
        params, plain = ([filled((5000,), dtype, 1)] for _ in range(2))
        grads = [filled((5000,), dtype, 2)]
        round_by_chance(params, grads, 1, 1)
        norm = torch.ones((), dtype=torch.float64)
        ops.sam_ascend_(plain, grads, ops.backup_like(plain), norm, 1.0, eps=0.0)
        assert same_bytes(params[0], plain[0])
