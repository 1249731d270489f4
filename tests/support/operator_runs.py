"""Every operator on a problem, on the device of its tensors: what must agree in every bit between two kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from drawing import st
from flatmin import ops
from problems import LAYOUTS, Problem, fill

Options = dict[str, Any]

SGD_OPTIONS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.25]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "own_rates": st.booleans(),
        "first_step": st.booleans(),
    }
)
ADAM_OPTIONS = st.fixed_dictionaries(
    {
        "beta1": st.sampled_from([0.9, 0.4, 0.0]),
        "beta2": st.sampled_from([0.999, 0.5]),
        "eps": st.sampled_from([1e-3, 1e-8]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled": st.booleans(),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "own_rates": st.booleans(),
    }
)

LION_OPTIONS = st.fixed_dictionaries(
    {
        "beta1": st.sampled_from([0.9, 0.0]),
        "beta2": st.sampled_from([0.99, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "own_rates": st.booleans(),
    }
)

#: Of two lists and of three; a term of coefficient 0 is left out.
COEFFICIENTS = st.sampled_from([(0.5, -2.0), (1.0, 1.0, -1.0), (0.0, 0.75, 3.0), (-1.5, 0.0, 0.0)])
FUSED_BASES = ("sgd", "adam", "lion")


def moved(t: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` with the strides, the offset and the surrounding memory of ``t``."""
    memory = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).to(device, copy=True)
    return torch.empty(0, dtype=t.dtype, device=device).set_(
        memory.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


def problem_on(device: torch.device, problem: Problem) -> Problem:
    params, grads = ([moved(t, device) for t in tensors] for tensors in (problem.params, problem.grads))
    return Problem(params, grads, problem.state_dtypes, problem.seed)


def ascent(problem: Problem, p: float, adaptive: bool | str, key: tuple[int, int] | None = None) -> list[Tensor]:
    """Norm, for p = 1 the ties, parameters at ``w + e`` and backup; for p > 1 the same from one call."""
    params, grads, backup = problem.params, problem.grads, problem.backup()
    once = problem.copy()
    q = ops.dual_exponent(p)
    results = [ops.norm(grads, params, q=q, adaptive=adaptive)]
    rho: float | Tensor = 0.7
    if math.isinf(q):
        results.append(ops.ties(grads, results[0], params, adaptive=adaptive))
        rho = rho / results[1]
    chance = None if key is None else torch.tensor(key, dtype=torch.uint64).to(backup.device)
    ops.sam_ascend_(params, grads, backup, results[0], rho, q=q, adaptive=adaptive, key=chance)
    results += [*params, backup]
    if not math.isinf(q):
        again = once.backup()
        norm = ops.sam_norm_ascend_(once.params, once.grads, again, rho, q=q, adaptive=adaptive, key=chance)
        results += [norm, *once.params, again]
    return results


def _perturbed(problem: Problem) -> Tensor:
    """The backup of parameters that have moved."""
    backup = problem.backup()
    norm = torch.ones((), dtype=torch.float64, device=backup.device)
    ops.sam_ascend_(problem.params, problem.grads, backup, norm, 1.0)
    return backup


def restore(problem: Problem) -> list[Tensor]:
    backup = _perturbed(problem)
    ops.restore_(problem.params, backup)
    return [*problem.params, backup]


def _rates(lr: float, problem: Problem, options: Options) -> Options:
    """``lr`` and the other options; with ``own_rates`` each parameter has a rate and a weight decay of its own."""
    rest = {name: value for name, value in options.items() if name != "own_rates"}
    if not options.get("own_rates"):
        return rest | {"lr": lr}
    own = [(lr * (i + 1), 0.1 * (i % 3)) for i in range(len(problem.params))]
    return rest | {"lr": torch.tensor(own, dtype=torch.float64).to(problem.params[0].device)}


def sgd_step(problem: Problem, options: Options) -> list[Tensor]:
    """Parameters and momentum buffers after a restore fused with a step."""
    backup = _perturbed(problem)
    buffers = problem.state(1) if options["momentum"] else []
    ops.restore_sgd_(problem.params, problem.grads, buffers, backup, **_rates(0.5, problem, options))
    return [*problem.params, *buffers, backup]


def adam_step(problem: Problem, options: Options) -> list[Tensor]:
    """Parameters, moments and counters after a restore fused with a step."""
    backup = _perturbed(problem)
    means, squares = problem.state(1), problem.state(2, positive=True)
    largest = problem.state(3, positive=True) if options["amsgrad"] else []
    steps = [torch.tensor(float(i)) for i in range(len(problem.params))]
    ops.restore_adam_(
        problem.params, problem.grads, means, squares, largest, steps, backup, **_rates(0.01, problem, options)
    )
    return [*problem.params, *means, *squares, *largest, *steps, backup]


def long_list(dtype: torch.dtype) -> Problem:
    """More tensors than one launch takes, some strided and some empty, with more chunks than one block folds."""
    problem = Problem([], [], [], 11)
    for i in range(700):
        layout = "transposed" if i % 97 == 5 else "contiguous"
        shape = (i % 7, 3 + i % 31) if i != 350 else (1100, 4096)
        for tensors in (problem.params, problem.grads):
            tensors.append(fill(LAYOUTS[layout](shape, dtype), 2 * i + len(problem.grads)))
        problem.state_dtypes.append(dtype)
    return problem


def noise(problem: Problem, law: str, per_element: bool) -> list[Tensor]:
    """Parameters under noise of each way to size it, with what was tallied; PACGen and filter norms of the same."""
    key = ops.random_key(2**63 + 11, 5, 3, problem.params[0].device)
    lipschitz: float | list[Tensor] = [g.abs() for g in problem.grads] if per_element else 2.0
    sized = {"gamma": 0.5, "eps": 0.25, "scale": 0.5}
    results = []
    for options in (
        sized | {"curvatures": problem.grads, "lipschitz": lipschitz},
        sized,
        {"sizes": problem.grads, "scale": 0.25},
    ):
        run, backup = problem_on(problem.params[0].device, problem), problem.backup()
        tally = ops.scaled_noise_(run.params, backup, key, distribution=law, **options)
        results += [*run.params, backup, tally]
    count = len(problem.params)
    own_sizes = torch.tensor([(0.5 * (i % 3), 0.25, 0.1 * i) for i in range(count)], dtype=torch.float64)
    rows = [torch.cat([ops.random_key(9, 5, i // 2).view(torch.int64), torch.tensor([i % 2])]) for i in range(count)]
    if rows:
        run, backup = problem_on(problem.params[0].device, problem), problem.backup()
        own_keys = torch.stack(rows).to(key.device).view(torch.uint64)
        own = {"curvatures": problem.grads, "lipschitz": lipschitz, "scale": own_sizes.to(key.device)}
        tally = ops.scaled_noise_(run.params, backup, own_keys, distribution=law, **own)
        results += [*run.params, backup, tally]
    results.append(ops.pacgen(problem.params, problem.grads, gamma=0.5, eps=0.25, lipschitz=lipschitz))
    return results + ops.filter_norm(problem.params)


def averages(problem: Problem, source: str) -> list[Tensor]:
    """Averages of a curvature and of the quotients over a step, and the largest quotient."""
    device = problem.params[0].device
    backup = _perturbed(problem)
    h, rho = problem.state(1, positive=True), problem.state(2, positive=True)
    corrections = torch.tensor([2.0, 1.5], dtype=torch.float64).to(device)
    largest = ops.curvature_(
        h,
        problem.grads,
        decay=0.75,
        source=source,
        key=ops.random_key(3, 1, 0, device),
        params=problem.params,
        backup=backup,
        corrections=corrections,
        lipschitz=rho,
        lipschitz_decay=0.25,
        min_step=1e-3,
    )
    probes = [torch.zeros_like(p) for p in problem.params]
    ops.probe_(probes, ops.random_key(3, 1, 0, device))
    return [largest, *h, *rho, *probes]


def lion_step(problem: Problem, options: Options) -> list[Tensor]:
    """Parameters and averages after a restore fused with a step."""
    backup = problem.backup()
    ops.save_(problem.params, backup)
    means = problem.state(1)
    ops.restore_lion_(problem.params, problem.grads, means, backup, **_rates(0.01, problem, options))
    return [*problem.params, *means, backup]


def linear(problem: Problem, coefficients: tuple[float, ...]) -> list[Tensor]:
    """Inner products of two to four lists, and sums of two and three."""
    params, grads, others = problem.params, problem.grads, problem.state(1)
    lists = (params, grads, others, problem.state(2))
    results = [ops.gram(*lists[:k]) for k in (2, 3, 4)]
    ops.blend_(params, grads, others if len(coefficients) == 3 else (), coefficients=coefficients)
    results += [p.clone() for p in params]
    backup = problem.backup()
    ops.axpy_(params, grads, -0.375, backup=backup)
    results += [*(p.clone() for p in params), backup]
    ops.axpy_(params, others, 1.5)
    return [*results, *params]


def step_with_averages(problem: Problem, base: str) -> list[Tensor]:
    """Restore, step and averages in one pass; 16-bit parameters are left out."""
    wide = [i for i, p in enumerate(problem.params) if p.element_size() > 2]
    if not wide:
        return []
    problem = Problem(
        *([values[i] for i in wide] for values in (problem.params, problem.grads, problem.state_dtypes)), problem.seed
    )
    backup = _perturbed(problem)
    h, rho, buffers = problem.state(1, positive=True), problem.state(2, positive=True), problem.state(3)
    squares = problem.state(4, positive=True)
    corrections = torch.tensor([2.0, 1.5], dtype=torch.float64).to(backup.device)
    average: Options = {"curvatures": h, "lipschitz": rho, "corrections": corrections}
    lists = problem.params, problem.grads, buffers
    if base == "adam":
        steps = [torch.tensor(float(i)) for i in range(len(problem.params))]
        largest = ops.restore_adam_(*lists, squares, [], steps, backup, 0.01, **average)
    elif base == "lion":
        largest = ops.restore_lion_(*lists, backup, 0.01, **average)
    else:
        largest = ops.restore_sgd_(*lists, backup, 0.01, momentum=0.9, **average)
    return [largest, *problem.params, *buffers, *squares, *h, *rho, backup]
