"""One call that measures everything, within a time that is given."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_int, check_size, is_number
from .._distributed import agreed, gathered
from ..curvature._arguments import check_seed
from ..curvature._batches import Batches
from ..curvature._hvp import check_method, hvp
from ..curvature._measurement import LossFn, Measurement, shared_by
from ._ball import ADAPTIVE
from ._expected import expected_sharpness
from ._m_sharpness import MSharpness, m_sharpness
from ._pacgen import PACGen, pacgen
from ._passes import groups, loss_and_gradient
from ._plan import FULL, Plan, check_amounts, groups_within, planned
from ._report_result import Report
from ._report_rows import Row, m_key
from ._scored import Scored
from ._spectrum import spectrum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["report"]


def report(
    model: nn.Module,
    loss_fn: LossFn,
    train: Any,
    test: Any = None,
    *,
    params: Iterable[Tensor] | None = None,
    budget_s: float | None = None,
    like: Report | None = None,
    amounts: Mapping[str, int] | None = None,
    rho: float = 0.05,
    m: Sequence[int | None] = (1, 16, 256),
    adaptive: bool | str = False,
    scale: float = 0.01,
    relative_scale: float = 0.1,
    gamma: float = 0.1,
    eps: float = 0.1,
    method: str = "autograd",
    delta: float = 0.05,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> Report:
    """Everything that flatmin measures at a minimum: fit, norms, spectrum of the Hessian, sharpness, PACGen.

    ::

        found = flatmin.report(model, torch.nn.functional.cross_entropy, train_loader, test_loader, budget_s=300)
        print(found)
        found.plot("report.png")

    Losses, accuracies and norms are those of all data. Without a budget all other measures take all of ``train``, too.

    Args:
        model, loss_fn, params, progress: see :mod:`flatmin.curvature`. Call ``model.eval()`` first, as for a test.
        train, test: data as there; ``test`` None leaves test rows and gaps out.
        budget_s: seconds > 0 to keep to, as far as losses and gradients over all data leave room. It decides on how
            many samples curvature and sharpness are measured (the first ones), and the numbers of products, probes and
            draws, from the times of a product and a group: the same budget on another machine gives other numbers. The
            report says what was chosen. None: 100 products for eigenvalues, 5 probes of
            30 steps, 10 pairs of draws, 20 probes for the diagonal, 64 groups.
        like: an earlier report, of another model on the same data: take as many samples, products, probes, draws and
            groups as it did, so that :func:`compare` compares like with like. Instead of ``budget_s``.
        amounts: how much to measure, by name, the same on every machine: "samples" (the first ones of ``train``),
            "products" for eigenvalues, at most, "probes" and "steps" of the density, "pairs" of draws,
            "curvature_samples" (probes for the diagonal) and "noise_samples" of :func:`flatmin.pacgen`, "groups" of
            each size, at most. Those left out are as without a budget. Instead of ``budget_s`` and ``like``.
        rho, m, adaptive: of :func:`flatmin.sharpness.m_sharpness`; ``m`` holds one size of groups or several, None for
            one group of all samples. A size above the number of samples is left out.
        scale: standard deviation of normal noise on each weight, for the expected sharpness.
        relative_scale: the same in proportion to each weight.
        gamma, eps, delta: of :func:`flatmin.pacgen`.
        method: of Hessian-vector products, "autograd" or "finite_difference".
        seed: of all that is random.
        process_group: as in :func:`flatmin.curvature.linear_operator`: each rank brings its share of ``train`` and
            ``test``, and all get the same report. Numbers of samples are those of all ranks, of which each measures the
            first of its own in proportion.

    Returns:
        :class:`Report`.
    """
    began = time.monotonic()
    if like is not None and budget_s is not None:
        raise ValueError("budget_s and like: both given; an earlier report says how much to measure, or a budget does")
    if amounts is not None and (like is not None or budget_s is not None):
        raise ValueError("amounts: given beside budget_s or like; one of them says how much to measure")
    wanted = {} if amounts is None else check_amounts(amounts)
    groups_at_most = wanted.pop("groups", None)
    if like is not None and not isinstance(like, Report):
        raise TypeError(f"like: a {type(like).__name__} given; give what report() returned")
    _check(budget_s, m, adaptive, seed, rho=rho, scale=scale, relative_scale=relative_scale)
    check_method(method, None)
    model, group = shared_by(model, process_group)
    common: dict[str, Any] = {"params": None if params is None else list(params), "progress": progress}
    common["process_group"] = group
    rows, total, total_of_rank = _fit(model, loss_fn, train, test, common)
    weights, size = _weights(model, loss_fn, train, common)
    rows += weights
    plan, data, samples = FULL._replace(**{k: n for k, n in wanted.items() if k != "samples"}), train, total
    if budget_s is not None or like is not None or "samples" in wanted:
        with Measurement(model, loss_fn, train, common["params"], "", progress=False) as measured:
            if budget_s is not None:
                product = _product_time(measured, method) * total_of_rank / total
                left = budget_s - (time.monotonic() - began)
                plan, samples = agreed(planned(left, product, total), group)
            elif like is not None:
                plan, samples = like.plan, min(like.samples, total)
            else:
                samples = min(wanted["samples"], total)
            if samples < total:
                own = max(1, round(samples * total_of_rank / total))
                data = _first(measured, own)
                samples = sum(gathered(own, group))
    found = spectrum(model, loss_fn, data, plan, method, seed, common)
    rows += found.rows
    sharp, more = _m_sharpness(
        model, loss_fn, data, m, rho, adaptive, plan, samples, like, groups_at_most, seed, common
    )
    rows += more
    rows += _expected(model, loss_fn, data, scale, relative_scale, plan, seed, common)
    bound, more = _pacgen(model, loss_fn, data, plan, gamma, eps, delta, method, seed, common)
    rows += more
    settings = {
        "parameters": size,
        "training samples": total,
        "samples for curvature and sharpness": samples,
        "products for eigenvalues, at most": plan.products,
        "density": f"{plan.probes} probes of {plan.steps} steps",
        "draws for the expected sharpness": f"{plan.pairs} pairs",
        "probes for the diagonal": plan.curvature_samples,
        "rho": rho,
        "adaptive": adaptive,
        "scale": scale,
        "relative_scale": relative_scale,
        "gamma": gamma,
        "eps": eps,
        "method": method,
        "seed": seed,
        "budget_s": budget_s,
        "seconds": round(time.monotonic() - began, 2),
    }
    return Report(tuple(rows), settings, found.eigenvalues, found.density, sharp, bound, plan, samples)


def _check(budget_s: Any, m: Any, adaptive: Any, seed: Any, **sizes: Any) -> None:
    if budget_s is not None and (not is_number(budget_s) or not 0.0 < budget_s < math.inf):
        raise ValueError(f"budget_s: {budget_s!r} given; give seconds > 0, or None for no limit")
    if not isinstance(m, Sequence) or not m:
        raise TypeError(f"m: {m!r} given; give sizes of groups, (1, 16, 256)")
    for count in m:
        if count is not None:
            check_int("m", count, 1)
    if adaptive not in ADAPTIVE:
        raise ValueError(f"adaptive: {adaptive!r} given; give one of {', '.join(map(repr, ADAPTIVE))}")
    for name, value in sizes.items():
        check_size(name, value)
    check_seed(seed)


def _fit(
    model: nn.Module, loss_fn: LossFn, train: Any, test: Any, common: dict[str, Any]
) -> tuple[list[Row], int, int]:
    """Losses and accuracies of both sets, their gaps, and the number of training samples, on all ranks and on this."""
    rows, found, counts = [], {}, (0, 0)
    for name, data in (("train", train), ("test", test)):
        if data is None:
            continue
        scored = Scored(loss_fn)
        with _measured(model, scored, data, f"{name} loss", common) as m:
            found[name] = float(m.mean_loss()), scored.take(m)
            counts = counts if name == "test" else (m.count, m.own_count)
        loss, accuracy = found[name]
        rows.append(Row(f"{name}_loss", f"{name} loss", loss, None, "loss"))
        if accuracy is not None:
            rows.append(Row(f"{name}_accuracy", f"{name} accuracy", accuracy, None, ""))
    if len(found) == 2:
        (loss, accuracy), (test_loss, test_accuracy) = found["train"], found["test"]
        rows.append(Row("loss_gap", "gap: test - train loss", test_loss - loss, None, "loss"))
        if accuracy is not None and test_accuracy is not None:
            rows.append(Row("accuracy_gap", "gap: train - test accuracy", accuracy - test_accuracy, None, ""))
    return rows, *counts


def _measured(model: nn.Module, loss_fn: LossFn, data: Any, name: str, common: dict[str, Any]) -> Measurement:
    return Measurement(model, loss_fn, data, common["params"], name, 1, common["progress"], common["process_group"])


def _weights(model: nn.Module, loss_fn: LossFn, train: Any, common: dict[str, Any]) -> tuple[list[Row], int]:
    with _measured(model, loss_fn, train, "gradient", common) as m:
        _, gradient = loss_and_gradient(m, m.batches())
        rows = [
            Row("weight_norm", "norm of the weights", m.norm(m.params), None, "weight"),
            Row("gradient_norm", "norm of the gradient", m.norm(gradient), None, "loss / weight"),
        ]
        return rows, sum(p.numel() for p in m.params)


def _product_time(m: Measurement, method: str) -> float:
    """Seconds of a Hessian-vector product for each sample, from the first batch; the second of two, which is warm."""
    inputs, targets, size = next(m.batches())
    vectors = [torch.ones_like(z) for z in m.zeros()]
    for _ in range(2):
        start = time.monotonic()
        product = hvp(
            m.model, m.loss_fn, _like(m, [(inputs, targets)]), vectors, params=m.params, method=method, progress=False
        )
        float(ops.norm(m.parts[0].of(product)))  # waits for a device that works on its own
        seconds = time.monotonic() - start
    return seconds / size


def _first(m: Measurement, samples: int) -> Any:
    """The first ``samples`` of the data, as data."""
    return _like(m, [(inputs, targets) for inputs, targets, _ in next(groups(m, samples))])


def _like(m: Measurement, pairs: list[tuple[Any, Any]]) -> Any:
    """Batches that model and loss take as those of the measurement."""
    given = m.data.batches
    if given.forward is None:
        return Batches(pairs, size=given.size)
    return Batches([batch for batch, _ in pairs], forward=given.forward, size=given.size)


def _m_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    counts: Sequence[int | None],
    rho: float,
    adaptive: bool | str,
    plan: Plan,
    samples: int,
    like: Report | None,
    groups_at_most: int | None,
    seed: int,
    common: dict[str, Any],
) -> tuple[dict[int | None, MSharpness], list[Row]]:
    found: dict[int | None, MSharpness] = {}
    rows = []
    wanted = [m for m in dict.fromkeys(counts) if m is None or m <= samples]
    for m in wanted:
        options = common | {"adaptive": adaptive, "seed": seed}
        if m is not None:
            seconds = math.inf
            if like is not None and m in like.m_sharpness:
                options["max_groups"] = len(like.m_sharpness[m].sizes)
            elif groups_at_most is not None:
                options["max_groups"] = groups_at_most
            else:
                if not math.isinf(plan.seconds_for_groups):
                    start = time.monotonic()
                    m_sharpness(model, loss_fn, data, rho, m, max_groups=2, **options)
                    seconds = agreed(0.5 * (time.monotonic() - start), common["process_group"])
                options["max_groups"] = groups_within(plan.seconds_for_groups / len(wanted), seconds)
        found[m] = s = m_sharpness(model, loss_fn, data, rho, m, **options)
        size = f"{samples}, all" if m is None else str(m)
        note = "" if len(s.sizes) == 1 else f"std. error, {len(s.sizes)} groups"
        error = None if len(s.sizes) == 1 else s.stderr
        rows.append(Row(m_key(m), f"m-sharpness, m = {size}, rho = {rho:g}", s.value, error, "loss", note))
    return found, rows


def _expected(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    scale: float,
    relative_scale: float,
    plan: Plan,
    seed: int,
    common: dict[str, Any],
) -> list[Row]:
    rows = []
    kinds = (
        ("expected_sharpness", f"expected sharpness, noise {scale:g}", {"scale": scale}),
        (
            "expected_relative_sharpness",
            f"expected sharpness, noise {relative_scale:g} |w|",
            {"scale": relative_scale, "gamma": 1.0, "eps": 0.0},
        ),
    )
    for key, label, noise in kinds:
        options: dict[str, Any] = common | noise
        found = expected_sharpness(model, loss_fn, data, samples=plan.pairs, antithetic=True, seed=seed, **options)
        note = f"std. error, {plan.pairs} pairs of draws"
        rows.append(Row(key, label, found.value, found.stderr, "loss", note))
    return rows


def _pacgen(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    plan: Plan,
    gamma: float,
    eps: float,
    delta: float,
    method: str,
    seed: int,
    common: dict[str, Any],
) -> tuple[PACGen, list[Row]]:
    found = pacgen(
        model,
        loss_fn,
        data,
        gamma=gamma,
        eps=eps,
        delta=delta,
        method=method,
        curvature_samples=plan.curvature_samples,
        noise_samples=plan.noise_samples,
        seed=seed,
        **common,
    )
    chance = f"with probability {1.0 - delta:g}, loss in [0, 1]"
    return found, [
        Row("psi", "PACGen Psi", found.psi, None, "nats"),
        Row("bound_uniform", "bound, uniform noise", found.bound_uniform, None, "loss", chance),
        Row(
            "bound_truncated_normal",
            "bound, truncated normal noise",
            found.bound_truncated_normal,
            None,
            "loss",
            chance,
        ),
    ]
