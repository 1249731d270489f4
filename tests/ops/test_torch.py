"""The operators as citizens of torch: opcheck, fake tensors, torch.compile, version counters, inference mode."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flatmin import ops, reference
from flatmin.ops import _dispatch, _library
from operator_arguments import OPERATORS, bound, call, good, scalar
from problems import filled, same_bytes, twins

SHAPES = [(5,), (4, 3), (0,), (2, 3, 4, 5)]


def make(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [filled(shape, dtype, seed + i) for i, shape in enumerate(SHAPES)]


def raw_arguments(name: str, device: str = "cpu") -> tuple[Any, ...]:
    """One call of a raw operator, with an empty tensor in each list."""
    arguments = bound(name, good(name, SHAPES))
    moved: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.to(device), arguments)
    return moved


# ---- opcheck ----


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """Schema (what is mutated, what aliases), fake implementation, registration with autograd, dynamic shapes."""
    with torch.no_grad():
        results = torch.library.opcheck(getattr(torch.ops.flatmin, name).default, raw_arguments(name))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_isa() -> None:
    """No tensors go in or out, so only its schema can be checked."""
    results = torch.library.opcheck(torch.ops.flatmin.isa.default, (), test_utils="test_schema")
    assert results == {"test_schema": "SUCCESS"}


SCHEMAS = Path(__file__).with_name("operators.txt")


def test_schemas_are_the_published_ones() -> None:
    """The names and the order of arguments are an interface: code calls torch.ops.flatmin by them.

    A change of operators.txt is a change of the interface. The list that it is compared with is torch's own.
    """
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flatmin::")}
    names -= {"flatmin::cuda_ready"}  # of the CUDA library alone
    schemas = sorted(str(schema) for name in names for schema in torch._C._jit_get_schemas_for_operator(name))
    assert schemas == SCHEMAS.read_text().splitlines()


def test_the_reference_has_the_names_of_the_schemas() -> None:
    """Both are called by keyword, so a name that differs is a TypeError for whoever has no kernel."""
    for name, arguments in _library.ARGUMENTS.items():
        assert set(inspect.signature(getattr(reference, name)).parameters) == set(arguments), name


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_returns_what_the_kernel_returns(name: str) -> None:
    """Its shape and type, and nothing from an operator that returns nothing."""
    expected, got = call(name, good(name, SHAPES)), getattr(reference, name)(**good(name, SHAPES))
    if expected is None:
        assert got is None
    else:
        assert got.shape == expected.shape and got.dtype == expected.dtype


def test_a_result_without_a_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that returns something, but has no shape function, would only fail once it is compiled."""
    monkeypatch.delitem(_library._RESULTS, "norm")
    with pytest.raises(ImportError, match="norm"):
        _library._fake("norm")


@pytest.mark.parametrize("name", [name for name in OPERATORS if "lr" in _library.ARGUMENTS[name]])
def test_every_base_step_can_average_a_curvature(name: str) -> None:
    """A base without it would leave PerturbedOPT's curvature where it is, in silence. What the public operators take of
    it is one class; here are the schemas."""
    assert set(ops.Averages.__annotations__) <= set(_library.ARGUMENTS[name])
    assert [str(r.type) for r in _library.OPERATORS[name]._schema.returns] == ["Tensor"]
    assert set(ops.Averages.__annotations__) <= set(inspect.signature(getattr(reference, name)).parameters)


def test_a_call_gives_the_arguments_of_the_schema() -> None:
    with pytest.raises(TypeError, match=r"restore_: arguments .*'backup', 'extra'"):
        _dispatch.run("restore_", **good("restore_"), extra=1)


@pytest.mark.parametrize("module", [ops, reference])
def test_every_public_name_stays(module: ModuleType) -> None:
    """What could be imported before ops and reference were cut into files."""
    names = Path(__file__).with_name(f"names_of_{module.__name__.split('.')[1]}.txt").read_text().split()
    assert len(names) >= 15
    assert [name for name in names if not hasattr(module, name)] == []
    assert set(names) <= set(module.__all__)


# ---- fake and meta tensors ----


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors(name: str) -> None:
    result = getattr(torch.ops.flatmin, name).default(*raw_arguments(name, "meta"))
    expected = getattr(torch.ops.flatmin, name).default(*raw_arguments(name))
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


def stochastic_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """An ascent of 16-bit weights that rounds by a key made in the graph."""
    narrow = [p.bfloat16() for p in params]
    norm = ops.sam_norm_ascend_(narrow, grads, ops.backup_like(narrow), rho, key=ops.random_key(7, 3))
    torch._foreach_copy_(params, narrow)
    return norm


def sgd_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """A whole SAM step with fresh gradients made from the old ones in place of a second backward."""
    norm = ops.norm(grads, params, adaptive="asam")
    ops.sam_ascend_(params, grads, backup, norm, rho, adaptive="asam")
    again = [g + 0.5 * p for p, g in zip(params, grads, strict=True)]
    ops.restore_sgd_(params, again, buffers, backup, lr, momentum=0.9, weight_decay=0.01, nesterov=True)
    return norm


def blended_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """A surrogate-gap step: the ascent along a gradient, and two gradients blended by their products."""
    ops.axpy_(params, grads, rho, backup=backup)
    again = [g + 0.5 * p for p, g in zip(params, grads, strict=True)]
    products = ops.gram(grads, again, buffers)
    share = products[0, 1] / products[1, 1]
    ops.blend_(again, grads, buffers, coefficients=torch.stack([share, -share, rho]))
    ops.restore_lion_(params, again, buffers, backup, lr, weight_decay=0.01)
    ops.save_(params, backup)
    return products


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


def noise_step(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], backup: Tensor, rho: Tensor, lr: Tensor
) -> Tensor:
    """A whole step under noise, with the averages that the next one needs."""
    h, lipschitz = [b.abs() for b in buffers], [b.abs() for b in buffers]
    tally = ops.scaled_noise_(
        params,
        backup,
        ops.random_key(2**63 + 3, 4, 1),
        distribution="normal",
        curvatures=h,
        lipschitz=rho,
        gamma=0.1,
        eps=0.1,
    )
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
@pytest.mark.parametrize("step", [sgd_step, adam_step, restore_step, noise_step, stochastic_step, blended_step])
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
    curved: dict[str, Any] = {"curvatures": h, "corrections": corrections}
    assert written(lambda: ops.restore_lion_(params, grads, buffers, backup, 0.1, **curved), params, buffers, h)
    assert written(lambda: ops.save_(params, backup), [backup])
    assert written(lambda: ops.axpy_(params, grads, 0.5, backup=backup), params, [backup])
    assert written(lambda: ops.blend_(buffers, grads, params, coefficients=(1.0, 2.0, 3.0)), buffers)
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
