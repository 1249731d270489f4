"""Prints a digest of every operator's results on fixed inputs, as JSON: run by test_bits.py once for each FM_ISA.

The inputs come from integer arithmetic, so they are the same bits on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flatmin import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Empty, single, vector tails, around a buffer of 1024 and a chunk of 4096; many chunks, which threads share.
LENGTHS = (0, 1, 7, 33, 1023, 1025, 4095, 4097, 300_001)


def values(n: int, seed: int, dtype: torch.dtype, *, spread: int = 0) -> Tensor:
    """n numbers in (-4, 4) with 31 random bits, times a random power of two up to 2^spread, some of them 0."""
    mask = 2**32 - 1
    bits = torch.arange(n, dtype=torch.int64) * 2654435761 + seed * 40503 & mask
    for _ in range(2):  # Marsaglia's xorshift32
        bits ^= bits << 13 & mask
        bits ^= bits >> 17
        bits ^= bits << 5 & mask
    numbers = (bits - 2**31).double() * 2.0**-29
    if spread:
        numbers = torch.ldexp(numbers, bits % (spread + 1))
    return torch.where(bits % 61 == 0, 0.0, numbers).to(dtype)


@functools.cache
def _inputs(seed: int, dtype: torch.dtype, spread: int) -> list[Tensor]:
    flat = [values(n, seed + i, dtype, spread=spread) for i, n in enumerate(LENGTHS)]
    matrix = values(67 * 131, seed + 100, dtype, spread=spread)
    return [*flat, matrix.view(67, 131), matrix.clone().view(131, 67).t()]


def tensors(seed: int, dtype: torch.dtype, *, spread: int = 0) -> list[Tensor]:
    """New tensors, one of each length, and two matrices of which one is transposed, to take the strided path."""
    return [t.clone() for t in _inputs(seed, dtype, spread)]


def digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return sha.hexdigest()[:16]


def exactly(t: Tensor) -> str:
    return float(t).hex()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def norms(dtype: torch.dtype) -> dict[str, str]:
    """Each exponent and convention; in float64 also values far outside of the range where squares are normal."""
    results = {}
    grads, weights = tensors(1, dtype, spread=6), tensors(2, dtype)
    for q in (1.0, 1.5, 2.0, 3.0, 51.0, math.inf):
        for adaptive in (False, "asam", "davda54"):
            norm = ops.norm(grads, weights, q=q, adaptive=adaptive)
            results[f"norm q={q} {adaptive}"] = exactly(norm)
            if math.isinf(q):
                results[f"ties {adaptive}"] = exactly(ops.ties(grads, norm, weights, adaptive=adaptive))
    if dtype == torch.float64:
        for exponent in (-1060, -600, 600, 1000):
            scaled = [torch.ldexp(g, torch.tensor(exponent)) for g in grads]
            results[f"norm 2^{exponent}"] = exactly(ops.norm([*grads, *scaled]))
            results[f"norm of 2^{exponent} alone"] = exactly(ops.norm(scaled))
    return results


def ascents(dtype: torch.dtype) -> dict[str, str]:
    """Each exponent and convention; gradients of float32; stochastic rounding."""
    key = torch.tensor([2**63 + 5, 9], dtype=torch.uint64)
    cases: list[tuple[float, bool | str, torch.dtype, Tensor | None]] = [
        (q, adaptive, dtype, None)
        for q in (1.0, 1.5, 2.0, 51.0, math.inf)
        for adaptive in (False, "asam", "davda54", "big_vision")
    ]
    if dtype != torch.float32:
        cases += [(q, False, torch.float32, None) for q in (1.5, 2.0)]
    if dtype.itemsize == 2:
        cases += [(q, False, dtype, key) for q in (1.5, 2.0)]
    results = {}
    for q, adaptive, grad_dtype, chance in cases:
        params, grads = tensors(4, dtype), tensors(3, grad_dtype)
        backup = ops.backup_like(params).zero_()
        norm = ops.norm(grads, params, q=q, adaptive=adaptive)
        ops.sam_ascend_(params, grads, backup, norm, 0.7, q=q, adaptive=adaptive, key=chance)
        name = f"ascend q={q} {adaptive} {grad_dtype} {'nearest' if chance is None else 'stochastic'}"
        results[name] = digest([*params, backup])
    ops.restore_(params, backup)
    results["restore"] = digest(params)
    return results


def sgd_steps(dtype: torch.dtype) -> dict[str, str]:
    results = {}
    for state_dtype in {dtype: None, torch.float32: None}:
        for momentum, nesterov, maximize in ((0.0, False, False), (0.9, False, True), (0.9, True, False)):
            params, grads, backup = backed_up(dtype)
            buffers = tensors(6, state_dtype) if momentum else []
            ops.restore_sgd_(
                params,
                grads,
                buffers,
                backup,
                0.1,
                momentum=momentum,
                dampening=0.0 if nesterov else 0.25,
                weight_decay=0.01,
                nesterov=nesterov,
                maximize=maximize,
            )
            results[f"sgd {momentum} {nesterov} {maximize} {state_dtype}"] = digest([*params, *buffers])
    return results


def adam_steps(dtype: torch.dtype) -> dict[str, str]:
    results = {}
    for state_dtype in {dtype: None, torch.float32: None}:
        for decoupled, amsgrad, maximize in ((False, False, False), (True, True, False), (False, True, True)):
            params, grads, backup = backed_up(dtype)
            means = tensors(7, state_dtype)
            squares = [s.abs_() for s in tensors(8, state_dtype)]
            largest = [s.abs_() for s in tensors(9, state_dtype)] if amsgrad else []
            steps = [torch.tensor(float(i)) for i in range(len(params))]
            ops.restore_adam_(
                params,
                grads,
                means,
                squares,
                largest,
                steps,
                backup,
                0.01,
                weight_decay=0.01,
                decoupled=decoupled,
                amsgrad=amsgrad,
                maximize=maximize,
            )
            name = f"adam {decoupled} {amsgrad} {maximize} {state_dtype}"
            results[name] = digest([*params, *means, *squares, *largest, *steps])
    return results


def lion_steps(dtype: torch.dtype) -> dict[str, str]:
    results = {}
    for state_dtype in {dtype: None, torch.float32: None}:
        for weight_decay, maximize in ((0.0, False), (0.1, True), (0.1, False)):
            params, grads, backup = backed_up(dtype)
            means = tensors(7, state_dtype)
            ops.restore_lion_(params, grads, means, backup, 0.01, weight_decay=weight_decay, maximize=maximize)
            results[f"lion {weight_decay} {maximize} {state_dtype}"] = digest([*params, *means])
    return results


def linear(dtype: torch.dtype) -> dict[str, str]:
    """Inner products of two to four lists; sums of two and of three, with coefficients of 0; a copy to the backup."""
    results = {}
    lists = [tensors(20 + k, dtype, spread=6) for k in range(4)]
    for k in (2, 3, 4):
        results[f"gram of {k}"] = digest([ops.gram(*lists[:k])])
    for coefficients in ((0.5, -2.0), (1.0, 0.0), (0.7, -1.1, 3.0), (0.0, 1.0, 0.0)):
        params = tensors(4, dtype)
        ops.blend_(params, lists[0], lists[1] if len(coefficients) == 3 else (), coefficients=coefficients)
        results[f"blend {coefficients}"] = digest(params)
    backup = ops.backup_like(params).zero_()
    for saved in (None, backup):
        ops.axpy_(params, lists[2], -0.3, backup=saved)
        results[f"axpy {saved is not None}"] = digest([*params, backup])
    ops.save_(params, backup)
    results["save"] = digest([backup])
    return results


def noise(dtype: torch.dtype) -> dict[str, str]:
    """Each law and way to size it, probes, averages, PACGen and filter norms."""
    results = {}
    key = ops.random_key(2**63 + 5, 9, 2)
    curvatures, lipschitz = tensors(10, dtype, spread=6), [t.abs_() for t in tensors(11, dtype)]
    sized = {"gamma": 0.1, "eps": 0.25}
    ways = {
        "curvature": sized | {"curvatures": curvatures, "lipschitz": 2.0, "scale": 0.5},
        "elements": sized | {"curvatures": curvatures, "lipschitz": lipschitz},
        "neighbourhood": sized,
        "given": {"sizes": lipschitz, "scale": 0.125},
    }
    for law in ("uniform", "normal", "truncated_normal", "rademacher"):
        for way, options in ways.items():
            params = tensors(4, dtype)
            backup = ops.backup_like(params).zero_()
            tally = ops.scaled_noise_(params, backup, key, distribution=law, **options)
            results[f"noise {law} {way}"] = digest([*params, backup, tally])
        if law != "truncated_normal":
            ops.probe_(params, key, distribution=law)
            results[f"probe {law}"] = digest(params)
    results["pacgen"] = digest([ops.pacgen(tensors(4, dtype), curvatures, gamma=0.1, eps=0.25, lipschitz=lipschitz)])
    results["filter norm"] = digest(ops.filter_norm(tensors(4, dtype)))
    return results


def averages(dtype: torch.dtype) -> dict[str, str]:
    """An average by itself and with quotients; for the wide types also in one pass with the step."""
    results = {}
    key, corrections = ops.random_key(7), torch.tensor([2.0, 1.5], dtype=torch.float64)
    for source in ("square", "plain", "probed"):
        for quotients in (False, True):
            params, grads, backup = backed_up(dtype)
            h, rho = tensors(12, torch.float32), tensors(13, torch.float32) if quotients else []
            beside = {"params": params, "backup": backup, "corrections": corrections} if quotients else {}
            averaged = {"decay": 0.75, "lipschitz_decay": 0.1, "min_step": 1e-3}
            q = ops.curvature_(h, grads, source=source, key=key, lipschitz=rho, **averaged, **beside)
            results[f"average {source} {quotients}"] = digest([*h, *rho, q.view(1)])
    if dtype.itemsize > 2:
        average: dict[str, float] = {"decay": 0.75, "lipschitz_decay": 0.1, "min_step": 1e-3}
        params, grads, backup = backed_up(dtype)
        buffers, h, rho = tensors(6, dtype), tensors(12, dtype), tensors(13, dtype)
        q = ops.restore_sgd_curvature_(
            params, grads, buffers, h, rho, backup, 0.1, corrections, momentum=0.9, **average
        )
        results["sgd with average"] = digest([*params, *buffers, *h, *rho, q.view(1)])
        squares, steps = [t.abs_() for t in tensors(8, dtype)], [torch.ones(()) for _ in params]
        q = ops.restore_adam_curvature_(
            params, grads, buffers, squares, [], steps, h, [], backup, 0.1, corrections, **average
        )
        results["adam with average"] = digest([*params, *buffers, *squares, *h, q.view(1)])
        q = ops.restore_lion_(
            params, grads, buffers, backup, 0.1, curvatures=h, lipschitz=rho, corrections=corrections, **average
        )
        results["lion with average"] = digest([*params, *buffers, *h, *rho, q.view(1)])
    return results


def backed_up(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Perturbed parameters, the gradients there, and the backup."""
    params, grads = tensors(4, dtype), tensors(5, dtype)
    backup = ops.backup_like(params).zero_()
    ops.sam_ascend_(params, grads, backup, scalar(3.0), 0.7)
    return params, grads, backup


def samples(dtype: torch.dtype) -> dict[str, str]:
    """Label noise and draws by samples, whose types are fixed: by position, by index and by masks."""
    if dtype != torch.float32:
        return {}
    key, results = ops.random_key(2**63 + 5, 9, 3), {}
    for n, inner in ((301, 1), (301, 7), (301, 129), (20_011, 1)):
        labels = torch.arange(n * inner).view(n, inner) * 7 % 1000
        for name, index in (("positions", None), ("index", torch.arange(n) * 12_345 % 9_973)):
            for p, kind in ((0.3, "exclude_true"), (0.7, "uniform"), (1.0, "pair")):
                noisy = ops.corrupt_labels(labels, key, 1000, p, kind=kind, index=index)
                results[f"labels {n}x{inner} {name} {kind}"] = digest([noisy])
            for law in ("uniform", "normal", "rademacher"):
                drawn = ops.draw_samples(n, inner, key, distribution=law, index=index)
                results[f"draws {n}x{inner} {name} {law}"] = digest([drawn])
    return results


GROUPS = (norms, ascents, sgd_steps, adam_steps, lion_steps, linear, noise, averages, samples)


def digests() -> dict[str, str]:
    """Every result by name: norms as their exact value, tensors as a hash of their bytes."""
    results = {}
    for dtype in DTYPES:
        for group in GROUPS:
            results.update({f"{dtype} {name}": value for name, value in group(dtype).items()})
    return results


if __name__ == "__main__":
    print(json.dumps({"isa": torch.ops.flatmin.isa(), "library": ops.__file__, "digests": digests()}))
