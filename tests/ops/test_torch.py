"""The operators as citizens of torch: opcheck, fake tensors, torch.compile, version counters, inference mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flatmin import ops
from problems import filled, same_bytes, twins

SHAPES = [(5,), (4, 3), (0,), (2, 3, 4, 5)]


def make(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [filled(shape, dtype, seed + i) for i, shape in enumerate(SHAPES)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def raw_arguments(device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """One call of each raw operator."""
    w, g, m, v, x = (make(10 * k) for k in range(5))
    v, x = ([t.abs() for t in values] for values in (v, x))
    backup = ops.backup_like(w).zero_()
    norm, rho, lr = scalar(2.0), scalar(0.05), scalar(0.1)
    key = torch.tensor([7, 3], dtype=torch.uint64)
    steps = [torch.ones(()) for _ in w]
    one, corrections = scalar(1.0), torch.tensor([2.0, 1.5], dtype=torch.float64)
    index, none, out = torch.tensor([5, 0, 5]), torch.empty(0, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    h, rho_i = ([t.abs() for t in make(10 * k)] for k in (5, 6))
    arguments: dict[str, tuple[Any, ...]] = {
        "norm": (g, w, 2.0, 1, 0.01),
        "ties": (g, w, norm, 2, 0.01),
        "sam_ascend_": (w, g, backup, norm, rho, key, 2.0, 1, 0.01, 1e-12),
        "sam_norm_ascend_": (w, g, backup, rho, key, 2.0, 1, 0.01, 1e-12),
        "restore_": (w, backup),
        "restore_sgd_": (w, g, m, backup, lr, 0.9, 0.0, 0.01, True, False, False),
        "restore_adam_": (w, g, m, v, x, steps, backup, lr, 0.9, 0.999, 1e-8, 0.01, True, True, False),
        "restore_sgd_curvature_": (
            *(w, g, m, h, rho_i, backup, lr, corrections, 0.9, 0.0, 0.01, True, False, False, 0.99, 0.1, 1e-8),
        ),
        "restore_adam_curvature_": (
            *(w, g, m, v, x, steps, h, rho_i, backup, lr, corrections, 0.9, 0.999, 1e-8, 0.01, True, True, False),
            *(0.99, 0.1, 1e-8),
        ),
        "scaled_noise_": (w, h, rho_i, backup, key, one, one, one, 1, 2, 0.1, 0.1),
        "probe_": (w, key, 1),
        "curvature_": (h, g, rho_i, w, backup, key, corrections, 2, 1.0, 0.99, 0.1, 1e-8),
        "pacgen": (w, h, rho_i, one, one, 0.1, 0.1),
        "filter_norm": (w, False),
        "corrupt_labels": (torch.arange(12).view(3, 4), index, none, none, key, out, 12, 2**31, 11, 1, -100),
        "draw_samples": (index, key, 3, 4, 1),
    }
    moved: dict[str, tuple[Any, ...]] = tree_map_only(Tensor, lambda t: t.to(device), arguments)
    return moved


OPERATORS = sorted(raw_arguments())


# ---- opcheck ----


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """Schema (what is mutated, what aliases), fake implementation, registration with autograd, dynamic shapes."""
    with torch.no_grad():
        results = torch.library.opcheck(getattr(torch.ops.flatmin, name).default, raw_arguments()[name])
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_isa() -> None:
    """No tensors go in or out, so only its schema can be checked."""
    results = torch.library.opcheck(torch.ops.flatmin.isa.default, (), test_utils="test_schema")
    assert results == {"test_schema": "SUCCESS"}


def test_schemas_are_the_published_ones() -> None:
    """The names and the order of arguments are an interface: code calls torch.ops.flatmin by them."""
    assert str(torch.ops.flatmin.norm.default._schema) == (
        "flatmin::norm(Tensor[] tensors, Tensor[] weights, float q, int scaling, float eta) -> Tensor"
    )
    assert str(torch.ops.flatmin.ties.default._schema) == (
        "flatmin::ties(Tensor[] tensors, Tensor[] weights, Tensor norm, int scaling, float eta) -> Tensor"
    )
    assert str(torch.ops.flatmin.sam_ascend_.default._schema) == (
        "flatmin::sam_ascend_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) backup, Tensor norm, Tensor rho, "
        "Tensor key, float q, int scaling, float eta, float eps) -> ()"
    )
    assert str(torch.ops.flatmin.sam_norm_ascend_.default._schema) == (
        "flatmin::sam_norm_ascend_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) backup, Tensor rho, Tensor key, "
        "float q, int scaling, float eta, float eps) -> Tensor"
    )
    assert str(torch.ops.flatmin.restore_.default._schema) == (
        "flatmin::restore_(Tensor(a!)[] params, Tensor backup) -> ()"
    )
    assert str(torch.ops.flatmin.restore_sgd_.default._schema) == (
        "flatmin::restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor backup, "
        "Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
        "bool first_step) -> ()"
    )
    assert str(torch.ops.flatmin.restore_adam_.default._schema) == (
        "flatmin::restore_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor backup, Tensor lr, float beta1, float beta2, "
        "float eps, float weight_decay, bool decoupled, bool amsgrad, bool maximize) -> ()"
    )
    assert str(torch.ops.flatmin.restore_sgd_curvature_.default._schema) == (
        "flatmin::restore_sgd_curvature_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
        "Tensor(c!)[] curvatures, Tensor(d!)[] lipschitz, Tensor backup, Tensor lr, Tensor corrections, "
        "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step, "
        "float decay, float lipschitz_decay, float min_step) -> Tensor"
    )
    assert str(torch.ops.flatmin.restore_adam_curvature_.default._schema) == (
        "flatmin::restore_adam_curvature_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!)[] curvatures, "
        "Tensor(g!)[] lipschitz, Tensor backup, Tensor lr, Tensor corrections, float beta1, float beta2, float eps, "
        "float weight_decay, bool decoupled, bool amsgrad, bool maximize, float decay, float lipschitz_decay, "
        "float min_step) -> Tensor"
    )
    assert str(torch.ops.flatmin.scaled_noise_.default._schema) == (
        "flatmin::scaled_noise_(Tensor(a!)[] params, Tensor[] sizes, Tensor[] lipschitz, Tensor(b!) backup, "
        "Tensor key, Tensor scale, Tensor lipschitz_constant, Tensor curvature_scale, int sizing, int law, "
        "float gamma, float eps) -> Tensor"
    )
    assert str(torch.ops.flatmin.probe_.default._schema) == (
        "flatmin::probe_(Tensor(a!)[] tensors, Tensor key, int law) -> ()"
    )
    assert str(torch.ops.flatmin.curvature_.default._schema) == (
        "flatmin::curvature_(Tensor(a!)[] curvatures, Tensor[] sources, Tensor(b!)[] lipschitz, Tensor[] params, "
        "Tensor backup, Tensor key, Tensor corrections, int source, float source_scale, float decay, "
        "float lipschitz_decay, float min_step) -> Tensor"
    )
    assert str(torch.ops.flatmin.pacgen.default._schema) == (
        "flatmin::pacgen(Tensor[] params, Tensor[] curvatures, Tensor[] lipschitz, Tensor lipschitz_constant, "
        "Tensor curvature_scale, float gamma, float eps) -> Tensor"
    )
    assert str(torch.ops.flatmin.filter_norm.default._schema) == (
        "flatmin::filter_norm(Tensor[] tensors, bool whole) -> Tensor"
    )
    assert str(torch.ops.flatmin.corrupt_labels.default._schema) == (
        "flatmin::corrupt_labels(Tensor labels, Tensor index, Tensor bounds, Tensor targets, Tensor key, "
        "Tensor(a!) out, int classes, int threshold, int span, int offset, int ignore_index) -> ()"
    )
    assert str(torch.ops.flatmin.draw_samples.default._schema) == (
        "flatmin::draw_samples(Tensor index, Tensor key, int count, int inner, int law) -> Tensor"
    )
    assert str(torch.ops.flatmin.isa.default._schema) == "flatmin::isa() -> int"


# ---- fake and meta tensors ----


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors(name: str) -> None:
    result = getattr(torch.ops.flatmin, name).default(*raw_arguments("meta")[name])
    expected = getattr(torch.ops.flatmin, name).default(*raw_arguments()[name])
    if isinstance(expected, Tensor):
        assert result.device.type == "meta" and result.dtype == expected.dtype and result.shape == expected.shape
    else:
        assert result is None


def test_fake_tensors_through_the_public_operators() -> None:
    with FakeTensorMode() as mode:
        params, grads = ([torch.empty(shape) for shape in SHAPES] for _ in range(2))
        backup = ops.backup_like(params)
        norm = ops.norm(grads)
        ops.sam_ascend_(params, grads, backup, norm, 0.05)
        ops.restore_(params, backup)
    assert norm.fake_mode is mode  # type: ignore[attr-defined]
    assert norm.dtype == torch.float64 and norm.shape == () and norm.device.type == "cpu"


# ---- torch.compile ----


def sgd_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """A whole SAM step with fresh gradients made from the old ones in place of a second backward."""
    norm = ops.norm(grads, params, adaptive="asam")
    ops.sam_ascend_(params, grads, backup, norm, rho, adaptive="asam")
    again = [g + 0.5 * p for p, g in zip(params, grads, strict=True)]
    ops.restore_sgd_(params, again, buffers, backup, lr, momentum=0.9, weight_decay=0.01, nesterov=True)
    return norm


def adam_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """With p = 1, whose radius is a tensor computed on the way."""
    norm = ops.norm(grads, q=math.inf)
    ops.sam_ascend_(params, grads, backup, norm, rho / ops.ties(grads, norm), q=math.inf)
    again = [g + 0.5 * p for p, g in zip(params, grads, strict=True)]
    squares, steps = [b * b for b in buffers], [torch.ones(()) for _ in params]
    ops.restore_adam_(params, again, buffers, squares, [], steps, backup, lr, weight_decay=0.01, decoupled=True)
    return norm


def restore_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """The loss at the adversarial point, weights back where they were."""
    norm = ops.norm(grads)
    ops.sam_ascend_(params, grads, backup, norm, rho)
    loss = torch.stack([p.square().sum() for p in params]).sum()
    ops.restore_(params, backup)
    return loss


NOISE_KEY = torch.tensor([3, 4], dtype=torch.uint64)  # inductor makes no uint64


def noise_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """A whole step under noise, with the averages that the next one needs."""
    h, lipschitz = [b.abs() for b in buffers], [b.abs() for b in buffers]
    tally = ops.scaled_noise_(params, backup, NOISE_KEY, law="normal", curvatures=h, lipschitz=rho, gamma=0.1, eps=0.1)
    again = [g + 0.5 * p for p, g in zip(params, grads, strict=True)]
    corrections = torch.tensor([2.0, 1.5], dtype=torch.float64)
    largest = ops.restore_sgd_curvature_(
        params, again, buffers, h, lipschitz, backup, lr, corrections, momentum=0.9, decay=0.9
    )
    psi = ops.pacgen(params, h, lipschitz=lipschitz)
    return torch.cat([tally, largest.view(1), psi.flatten(), *(n.flatten() for n in ops.filter_norm(params))])


Step = Callable[[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor], Tensor]


def step_arguments() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    params = make(0)
    return params, make(10), make(20), ops.backup_like(params).zero_(), scalar(0.05), scalar(0.1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("step", [sgd_step, adam_step, restore_step, noise_step])
def test_compiled_as_one_graph(step: Step, backend: str) -> None:
    """No graph break, and the same weights, state, backup and norm as without compilation.

    The kernels' results are equal in every bit; what inductor itself computes (the gradients made here) may be fused
    into other roundings, hence the tolerance of one float32 rounding in that case.
    """
    torch._dynamo.reset()
    got, want = step_arguments(), step_arguments()
    tolerance = 1e-6 if backend == "inductor" else 0.0
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        result, expected = compiled(*got), step(*want)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_a_new_radius_or_rate_does_not_recompile() -> None:
    """They travel as tensors, which the kernels read: schedules would otherwise recompile at every step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sgd_step, fullgraph=True, backend=counter)
    params, grads, buffers, backup, _, _ = step_arguments()
    expected = copy.deepcopy((params, grads, buffers, backup))
    compilations = []
    for k in range(5):
        rho, lr = scalar(0.05 / (k + 1)), scalar(0.1 / (k + 1))
        compiled(params, grads, buffers, backup, rho, lr)
        sgd_step(*expected, rho, lr)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 5
    assert all(same_bytes(p, e) for p, e in zip(params, expected[0], strict=True))


def test_a_float_radius_compiles() -> None:
    """A plain float is a constant of the graph, at worst made symbolic once it changes: no error, no break."""
    torch._dynamo.reset()

    def ascend(params: list[Tensor], grads: list[Tensor], backup: Tensor, rho: float) -> None:
        ops.sam_ascend_(params, grads, backup, ops.norm(grads), rho)

    compiled = torch.compile(ascend, fullgraph=True, backend="aot_eager")
    for rho in (0.05, 0.1, 0.2):
        got, want, grads = make(0), make(0), make(10)
        compiled(got, grads, ops.backup_like(got), rho)
        ascend(want, grads, ops.backup_like(want), rho)
        assert all(same_bytes(p, e) for p, e in zip(got, want, strict=True))


# ---- autograd ----


def test_versions_of_everything_written() -> None:
    params, grads, buffers, means, squares, largest = (make(k) for k in range(6))
    squares, largest = [s.abs() for s in squares], [s.abs() for s in largest]
    steps = [torch.zeros(()) for _ in params]
    backup = ops.backup_like(params)

    def written(call: Callable[[], object], *lists: list[Tensor]) -> bool:
        """Whether ``call`` advances the version of each tensor of ``lists`` and of no gradient."""
        tensors = [t for values in lists for t in values]
        before, before_grads = [t._version for t in tensors], [g._version for g in grads]
        call()
        assert [g._version for g in grads] == before_grads
        return all(t._version > old for t, old in zip(tensors, before, strict=True))

    assert written(lambda: ops.sam_ascend_(params, grads, backup, scalar(1.0), 0.05), params, [backup])
    assert written(lambda: ops.sam_norm_ascend_(params, grads, backup, 0.05), params, [backup])
    assert written(lambda: ops.restore_(params, backup), params)
    assert written(lambda: ops.restore_sgd_(params, grads, buffers, backup, 0.1, momentum=0.9), params, buffers)
    assert written(
        lambda: ops.restore_adam_(params, grads, means, squares, largest, steps, backup, 0.1, amsgrad=True),
        params,
        means,
        squares,
        largest,
        steps,
    )
    h, rho = ([t.abs() for t in make(k)] for k in (7, 8))
    key, corrections = ops.random_key(1), torch.ones(2, dtype=torch.float64)
    average: list[Any] = [h, rho, backup, 0.1, corrections]
    assert written(lambda: ops.scaled_noise_(params, backup, key, eps=1.0), params, [backup])
    assert written(lambda: ops.probe_(buffers, key), buffers)
    assert written(lambda: ops.curvature_(h, grads, decay=0.5, params=params, backup=backup, lipschitz=rho), h, rho)
    assert written(
        lambda: ops.restore_sgd_curvature_(params, grads, buffers, *average, momentum=0.9), params, buffers, h, rho
    )
    assert written(
        lambda: ops.restore_adam_curvature_(params, grads, means, squares, [], steps, *average),
        *(params, means, squares, steps, h, rho),
    )


@pytest.mark.parametrize("writer", ["ascend", "restore", "restore_sgd", "restore_adam"])
def test_a_stale_graph_raises(writer: str) -> None:
    """The backward of w * w needs the w of its forward: after a step in between, an error and not a wrong gradient."""
    w = torch.ones(3, requires_grad=True)
    params, grads = [w], [torch.ones(3)]
    backup = ops.backup_like(params)
    if writer != "ascend":
        ops.sam_ascend_(params, grads, backup, scalar(1.0), 0.05)
    loss = (w * w).sum()
    if writer == "ascend":
        ops.sam_ascend_(params, grads, backup, scalar(1.0), 0.05)
    elif writer == "restore":
        ops.restore_(params, backup)
    elif writer == "restore_sgd":
        ops.restore_sgd_(params, grads, [], backup, 0.1)
    else:
        state = torch.zeros(3), torch.zeros(3), torch.zeros(())
        ops.restore_adam_(params, grads, [state[0]], [state[1]], [], [state[2]], backup, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_leaves_that_require_grad() -> None:
    """Parameters are changed outside of autograd: no graph is recorded, and they stay leaves."""
    params = [p.requires_grad_() for p in make(0)]
    grads, backup = make(10), ops.backup_like(params)
    norm = ops.norm([g.requires_grad_() for g in grads])
    ops.sam_ascend_(params, grads, backup, norm, 0.05)
    ops.restore_sgd_(params, grads, [], backup, 0.1)
    assert not norm.requires_grad
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)


def test_inference_mode() -> None:
    """Ordinary tensors, and tensors born in inference mode, which have no version to count."""
    outside, want = make(0), make(0)
    grads = make(10)
    expected = ops.norm(grads)
    ops.sam_ascend_(want, grads, ops.backup_like(want), expected, 0.05)
    with torch.inference_mode():
        for params in (outside, twins(outside)):
            again = ops.backup_like(params)
            norm = ops.norm(grads)
            ops.sam_ascend_(params, grads, again, norm, 0.05)
            assert norm == expected
            assert all(same_bytes(p, e) for p, e in zip(params, want, strict=True))
            ops.restore_(params, again)
            assert all(same_bytes(p, e) for p, e in zip(params, make(0), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch 2.13
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch 2.14
def test_temporaries_that_only_the_operator_holds() -> None:
    """A script hands its lists over, unlike Python, which keeps its arguments: what is freed early is overwritten."""

    @torch.jit.script
    def norm_of_multiples(x: Tensor) -> Tensor:
        return torch.ops.flatmin.norm([x * 2.0, x * 3.0], [x * 0.0, x * 0.0], 2.0, 0, 0.0)

    x = torch.arange(1.0, 1000.0)
    want = ops.norm([x * 2.0, x * 3.0])
    assert all(norm_of_multiples(x).item() == want.item() for _ in range(10))


# ---- scalars and subclasses as torch code passes them ----


@pytest.mark.parametrize("rho", [0.05, torch.tensor(0.05), torch.tensor(0.05, dtype=torch.float64)], ids=str)
def test_a_radius_of_any_kind(rho: float | Tensor) -> None:
    params = [torch.zeros(3, dtype=torch.float64)]
    ops.sam_ascend_(params, [torch.ones(3, dtype=torch.float64)], ops.backup_like(params), scalar(1.0), rho)
    # 1e-9: a float32 0.05 is 0.05 + 7.5e-10
    assert params[0].tolist() == pytest.approx([0.05] * 3, abs=1e-9)


def test_parameters_of_a_module() -> None:
    """nn.Parameter, a generator turned into a list, channels_last weights with contiguous gradients."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
    for p in net.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9)
    net(x).square().mean().backward()
    params = list(net.parameters())
    grads = [p.grad.contiguous() for p in params if p.grad is not None]
    before, clean = twins([p.detach() for p in params]), net(x).square().mean()
    backup = ops.backup_like(params)
    ops.sam_ascend_(params, grads, backup, ops.norm(grads), 0.01)
    assert net(x).square().mean() > clean
    ops.restore_(params, backup)
    assert all(same_bytes(p.detach(), w) for p, w in zip(params, before, strict=True))
    assert params[0].is_contiguous(memory_format=torch.channels_last)
