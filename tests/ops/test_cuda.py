"""On a GPU: the bits of the C kernels, a host that never waits, streams, graphs, devices, memory, mixed precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drawing import given, st
from flatmin import SAM, ops
from gpu_runs import BASES, BUSY_CYCLES, DEVICE, HOST, captured, data, launches, mlp, no_waiting, sam_step
from models import same_bits
from operator_runs import (
    ADAM_OPTIONS,
    COEFFICIENTS,
    FUSED_BASES,
    LION_OPTIONS,
    SGD_OPTIONS,
    Options,
    adam_step,
    ascent,
    averages,
    linear,
    lion_step,
    long_list,
    moved,
    noise,
    problem_on,
    restore,
    sgd_step,
    step_with_averages,
)
from problems import ADAPTIVE, DTYPES, P_NORMS, Problem, filled, large_problem, problems, same_memory
from requirements import LAUNCH_ROWS

pytestmark = pytest.mark.cuda

SGD_DEFAULTS: Options = {
    "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": False, "first_step": False
}  # fmt: skip
ADAM_DEFAULTS: Options = {
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "amsgrad": True,
    "maximize": False,
}  # fmt: skip


# ---- the bits of the C kernels ----


def assert_bits_of_the_host(run: Callable[..., list[Tensor]], problem: Problem, *args: Any) -> None:
    """Whole memories are compared: what lies between the elements must not change either."""
    want = run(problem_on(HOST, problem), *args)
    got = run(problem_on(DEVICE, problem), *args)
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert same_memory(moved(g, HOST), w), f"result {i} of {run.__name__}"


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("p", P_NORMS)
@given(problem=problems())
def test_ascent(p: float, adaptive: bool | str, problem: Problem) -> None:
    assert_bits_of_the_host(ascent, problem, p, adaptive)


@given(problem=problems(), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**64 - 1))
def test_ascent_with_stochastic_rounding(problem: Problem, seed: int, step: int) -> None:
    assert_bits_of_the_host(ascent, problem, 2.0, False, (seed, step))


@given(problem=problems())
def test_restore(problem: Problem) -> None:
    assert_bits_of_the_host(restore, problem)


@given(problem=problems(), options=SGD_OPTIONS)
def test_sgd(problem: Problem, options: Options) -> None:
    assert_bits_of_the_host(sgd_step, problem, options)


@given(problem=problems(), options=ADAM_OPTIONS)
def test_adam(problem: Problem, options: Options) -> None:
    assert_bits_of_the_host(adam_step, problem, options)


@given(problem=problems(), options=LION_OPTIONS)
def test_lion(problem: Problem, options: Options) -> None:
    assert_bits_of_the_host(lion_step, problem, options)


@given(problem=problems(), coefficients=COEFFICIENTS)
def test_inner_products_and_sums(problem: Problem, coefficients: tuple[float, ...]) -> None:
    assert_bits_of_the_host(linear, problem, coefficients)


@pytest.mark.parametrize("law", ["uniform", "normal", "truncated_normal", "rademacher"])
@given(problem=problems(), per_element=st.booleans())
def test_noise(law: str, problem: Problem, per_element: bool) -> None:
    assert_bits_of_the_host(noise, problem, law, per_element)


@pytest.mark.parametrize("source", ["square", "plain", "probed"])
@given(problem=problems())
def test_averages(source: str, problem: Problem) -> None:
    assert_bits_of_the_host(averages, problem, source)


@given(problem=problems(), base=st.sampled_from(FUSED_BASES))
def test_steps_with_averages(problem: Problem, base: str) -> None:
    assert_bits_of_the_host(step_with_averages, problem, base)


@pytest.mark.parametrize("make", [large_problem, long_list])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_and_several_launches(make: Callable[[torch.dtype], Problem], dtype: torch.dtype) -> None:
    problem = make(dtype)
    for p in P_NORMS:
        assert_bits_of_the_host(ascent, problem, p, "asam")
    assert_bits_of_the_host(restore, problem)
    assert_bits_of_the_host(sgd_step, problem, SGD_DEFAULTS)
    assert_bits_of_the_host(adam_step, problem, ADAM_DEFAULTS)
    assert_bits_of_the_host(noise, problem, "normal", True)
    assert_bits_of_the_host(averages, problem, "probed")
    for base in FUSED_BASES:
        assert_bits_of_the_host(step_with_averages, problem, base)
    assert_bits_of_the_host(lion_step, problem, {})
    assert_bits_of_the_host(linear, problem, (0.5, -2.0, 3.0))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(q: float, value: float) -> None:
    """The bits of a NaN are the one thing in which devices differ, so it is not compared but looked for."""
    params, grads = ([filled((5000,), torch.float32, seed).to(DEVICE)] for seed in (1, 2))
    grads[0][4321] = value
    before, backup = params[0].clone(), ops.backup_like(params)
    norm = ops.norm(grads, q=q)
    ops.sam_ascend_(params, grads, backup, norm, 0.5, q=q)
    assert norm.isnan() if math.isnan(value) else norm == math.inf
    assert same_bits(params, [before])
    assert torch.equal(backup[: before.nbytes], before.view(torch.uint8))


@pytest.mark.cuda(gib=20)
def test_a_tensor_of_more_elements_than_an_int_counts() -> None:
    """2^31 + 4097 elements, the last in a short chunk of its own: gradient (4, 0, ..., 0, 3), norm 5."""
    n = 2**31 + 4097
    params, grads = ([torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)] for _ in range(2))
    grads[0][0], grads[0][-1] = 4.0, 3.0
    backup = ops.backup_like(params)
    norm = ops.norm(grads)
    ops.sam_ascend_(params, grads, backup, norm, 5.0)
    assert norm == 5.0
    assert params[0].count_nonzero() == 2
    assert (params[0][0], params[0][-1]) == (4.0, 3.0)
    ops.restore_(params, backup)
    assert params[0].count_nonzero() == 0


# ---- launches ----


@pytest.mark.parametrize(("tensors", "per_pass"), [(1, 1), (213, 1), (LAUNCH_ROWS, 1), (LAUNCH_ROWS + 1, 2)])
def test_a_pass_over_a_full_table_is_one_launch(tensors: int, per_pass: int) -> None:
    params, grads, buffers = ([torch.ones(1000, device=DEVICE) for _ in range(tensors)] for _ in range(3))
    backup, norm = ops.backup_like(params), torch.ones((), dtype=torch.float64, device=DEVICE)
    assert launches(lambda: ops.norm(grads)) == {"reduce": per_pass, "fold": 1}
    assert launches(lambda: ops.sam_ascend_(params, grads, backup, norm, 0.1)) == {"update": per_pass}
    both = launches(lambda: ops.sam_norm_ascend_(params, grads, backup, 0.1))
    assert both == {"reduce": per_pass, "fold": 1, "update": per_pass}
    assert launches(lambda: ops.restore_(params, backup)) == {"update": per_pass}
    step = launches(lambda: ops.restore_sgd_(params, grads, buffers, backup, 0.1, momentum=0.9))
    assert step == {"update": per_pass}


# ---- the host runs ahead ----


def test_the_check_for_waiting_bites() -> None:
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_waiting():
        value.item()
    with pytest.raises(AssertionError, match="the host waited"), no_waiting():
        while not torch.cuda.current_stream().query():
            time.sleep(0.01)


@pytest.mark.parametrize("place", [None, HOST, DEVICE], ids=["float", "on the host", "on the device"])
def test_operators_do_not_wait(place: torch.device | None) -> None:
    """Whatever the radius and the rate are: numbers, or tensors of another type than the kernels read."""
    rho = 0.05 if place is None else torch.tensor(0.05, device=place)
    problem = problem_on(DEVICE, large_problem(torch.float32))
    params, grads, backup = problem.params, problem.grads, problem.backup()
    buffers, means, squares = problem.state(1), problem.state(2), problem.state(3, positive=True)
    steps = [torch.zeros(()) for _ in params]

    def run() -> None:
        for q in (1.0, 1.5, 2.0, math.inf):
            norm = ops.norm(grads, params, q=q, adaptive=True)
            ops.ties(grads, norm, params, adaptive=True)
            ops.sam_ascend_(params, grads, backup, norm, rho, q=q, adaptive=True)
            ops.restore_(params, backup)
        ops.restore_sgd_(params, grads, buffers, backup, rho, momentum=0.9)
        ops.restore_adam_(params, grads, means, squares, [], steps, backup, rho)

    run()
    with no_waiting():
        run()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"p": 1.0, "adaptive": True}),
        (torch.float32, {"rho": torch.tensor(0.05)}),
        (torch.bfloat16, {"rounding": "stochastic"}),
    ],
    ids=str,
)
def test_a_whole_step_does_not_wait(dtype: torch.dtype, options: dict[str, Any], base: str) -> None:
    """The fused forms of SGD and AdamW, and a base that has none."""
    net, batch = mlp(dtype), data(dtype)
    opt = SAM(BASES[base](net.parameters()), **options)
    for _ in range(2):  # the first step makes the state
        sam_step(net, opt, batch)
    with no_waiting():
        sam_step(net, opt, batch)
    assert all(p.isfinite().all() for p in net.parameters())


# ---- streams and graphs ----


def test_operators_run_on_the_current_stream() -> None:
    """On another stream than this the operators would read gradients that are not there yet."""
    params, grads = ([torch.zeros(100_000, device=DEVICE)] for _ in range(2))
    backup, real = ops.backup_like(params), torch.full((100_000,), 2.0, device=DEVICE)
    ops.sam_ascend_(params, grads, backup, ops.norm(grads), 0.1)  # loads the kernels
    ops.restore_(params, backup)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY_CYCLES)
        grads[0].copy_(real)
        norm = ops.norm(grads)
        ops.sam_ascend_(params, grads, backup, norm, 0.1)
    assert torch.cuda.default_stream(DEVICE).query()
    assert not side.query()
    side.synchronize()
    assert norm.item() == pytest.approx(2.0 * math.sqrt(100_000), rel=1e-14)
    assert params[0][-1].item() == pytest.approx(0.1 / math.sqrt(100_000), rel=1e-6)


class TensorStep:
    """A SAM step made of operators whose radius and rate lie on the device. The loss, ``sum (w - target)^4``, has
    gradients that torch computes element by element: the same bits whether captured or not."""

    SHAPES = ((3,), (129, 65), (4097,))

    def __init__(self, dtype: torch.dtype) -> None:
        self.targets = [torch.empty(shape, dtype=dtype, device=DEVICE) for shape in self.SHAPES]
        self.params = [torch.empty_like(t, requires_grad=True) for t in self.targets]
        self.buffers = [torch.empty_like(t) for t in self.targets]
        self.rho, self.lr = (torch.empty((), dtype=torch.float64, device=DEVICE) for _ in range(2))
        self.key = torch.empty(2, dtype=torch.uint64, device=DEVICE)
        self.backup = ops.backup_like(self.params)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        for i, (p, buffer) in enumerate(zip(self.params, self.buffers, strict=True)):
            p.copy_(filled(p.shape, p.dtype, i))
            buffer.zero_()
        self.prepare(0)

    def prepare(self, step: int) -> None:
        """What changes from step to step."""
        for i, target in enumerate(self.targets):
            target.copy_(filled(target.shape, target.dtype, 10 * step + i))
        self.rho.fill_(0.1 * (step + 1))
        self.lr.fill_(1e-3 / (step + 1))
        self.key.copy_(torch.tensor([5, step], dtype=torch.uint64))

    def gradients(self) -> list[Tensor]:
        losses = [((p - t) ** 4).sum() for p, t in zip(self.params, self.targets, strict=True)]
        return list(torch.autograd.grad(losses, self.params))

    def step(self) -> None:
        grads = self.gradients()
        ops.sam_ascend_(self.params, grads, self.backup, ops.norm(grads), self.rho, key=self.key)
        ops.restore_sgd_(self.params, self.gradients(), self.buffers, self.backup, self.lr, momentum=0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_step_replays_with_new_numbers(dtype: torch.dtype) -> None:
    """Radius, rate, key and data of each replay are those on the device then; the weights go on from step to step."""
    eager, replayed = TensorStep(dtype), TensorStep(dtype)
    graph = captured(replayed.step)
    replayed.start()
    begin = [p.detach().clone() for p in eager.params]
    for step in range(5):
        eager.prepare(step)
        replayed.prepare(step)
        eager.step()
        graph.replay()
        assert same_bits(eager.params, replayed.params)
        assert same_bits(eager.buffers, replayed.buffers)
    assert not same_bits(eager.params, begin)


# ---- devices ----


def test_a_list_over_host_and_device_is_refused() -> None:
    params, grads = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)], [torch.ones(5, device=DEVICE)]
    backup, norm = ops.backup_like(params), torch.ones((), dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"grads\[1\] is on another device than the others"):
        ops.sam_ascend_(params, [*grads, torch.ones(5)], backup, norm, 0.1)
    with pytest.raises(RuntimeError, match="backup is on another device than the others"):
        ops.restore_(params, backup.cpu())
    assert all((p == 1).all() for p in params)


def test_counters_on_the_device_are_refused() -> None:
    """Reading them would make the host wait; torch keeps them on the host unless its optimizer is capturable."""
    params, means, squares = ([torch.ones(5, device=DEVICE)] for _ in range(3))
    backup, steps = ops.backup_like(params), [torch.zeros((), device=DEVICE)]
    with pytest.raises(RuntimeError, match=r"steps\[0\] must be a float32 tensor of one element on the CPU"):
        ops.restore_adam_(params, params, means, squares, [], steps, backup, 0.1)
    assert (params[0] == 1).all()


def test_a_sparse_gradient_is_refused() -> None:
    params, backup = [torch.ones(5, device=DEVICE)], torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    norm = torch.ones((), dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"grads\[0\] is sparse"):
        ops.sam_ascend_(params, [torch.ones(5, device=DEVICE).to_sparse()], backup, norm, 0.1)
    assert (params[0] == 1).all()


def split_step(places: list[torch.device]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights at ``w + e`` and restored, one parameter on each of ``places``, whose gradients come late."""
    params = [nn.Parameter(filled((1000,), torch.float64, i).to(place)) for i, place in enumerate(places)]
    opt = SAM(torch.optim.SGD(params, lr=0.1), rho=0.5)
    at_ascent: list[Tensor] = []
    for _ in range(2):  # the first time loads kernels, which may wait
        for i, p in enumerate(params):
            grad = filled((1000,), torch.float64, 10 + i)
            if p.is_cuda:
                with torch.cuda.device(p.device):
                    torch.cuda._sleep(BUSY_CYCLES)
                    grad = grad.pin_memory().to(p.device, non_blocking=True)
            p.grad = grad
        opt.ascend()
        at_ascent = [p.detach().to(HOST, copy=True) for p in params]
        opt.restore()
    return at_ascent, [p.detach().cpu() for p in params]


def assert_one_norm_over(places: list[torch.device]) -> None:
    """As on one device, but for the rounding of a norm that is combined of two."""
    at_ascent, restored = split_step(places)
    for got, want in zip(at_ascent, split_step([HOST] * len(places))[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)
    assert same_bits(restored, [filled((1000,), torch.float64, i) for i in range(len(places))])


@pytest.mark.parametrize("places", [[HOST, DEVICE], [DEVICE, HOST]], ids=str)
def test_one_norm_over_host_and_device(places: list[torch.device]) -> None:
    assert_one_norm_over(places)


@pytest.mark.cuda(devices=2)
def test_one_norm_over_two_devices() -> None:
    assert_one_norm_over([DEVICE, torch.device("cuda", 1)])


@pytest.mark.cuda(devices=2)
def test_operators_run_on_the_device_of_their_tensors() -> None:
    """Whatever the current one is, which stays it."""
    other = torch.device("cuda", 1)
    problem = large_problem(torch.float32)
    with torch.cuda.device(DEVICE):
        results = [ascent(problem_on(place, problem), 2.0, False) for place in (DEVICE, other)]
        assert torch.cuda.current_device() == DEVICE.index
    assert all(r.device == other for r in results[1])
    assert same_bits(*([moved(r, HOST) for r in side] for side in results))
    mixed = [torch.ones(5, device=DEVICE), torch.ones(5, device=other)]
    with pytest.raises(RuntimeError, match=r"tensors\[1\] is on another device than the others"):
        ops.norm(mixed)


# ---- memory ----


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_memory_peak_is_one_copy_of_the_parameters(base: str) -> None:
    """Beyond gradients and the base's state. The rest is 24 bytes of a norm for each chunk of 4096 elements: 0.2 %."""
    params = [nn.Parameter(torch.ones(1024, 1024, device=DEVICE)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    size, opt = sum(p.nbytes for p in params), SAM(BASES[base](params), rho=0.05)
    state = size * {"sgd": 1, "adamw": 2}[base]
    peaks = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
        opt.ascend()
        opt.step()
        peaks.append(torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"] - before)
    assert size <= peaks[0] - state <= 1.01 * size
    assert peaks[1] <= 0.01 * size  # the backup is kept


# ---- mixed precision ----


def scaled_step(
    net: nn.Module, opt: SAM, scaler: torch.amp.GradScaler, batch: tuple[Tensor, Tensor], poisoned: str = ""
) -> None:
    """A step under float16 autocast, with an infinite gradient in the pass that is named."""

    def backward(name: str) -> None:
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(net(batch[0]).float(), batch[1])
        scaler.scale(loss).backward()
        if poisoned == name:
            next(net.parameters()).grad[0] = math.inf  # type: ignore[index]

    opt.zero_grad()
    backward("first")
    with opt.perturb():
        backward("second")
    scaler.step(opt)
    scaler.update()


def test_grad_scaler_trains() -> None:
    """In half precision to within its rounding, 2^-11 of each product, of what single precision does."""
    nets, batch = (mlp(), mlp()), data()
    half, single = (SAM(BASES["sgd"](net.parameters()), rho=0.05) for net in nets)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = nn.functional.mse_loss(nets[0](batch[0]), batch[1]).item()
    for _ in range(10):
        scaled_step(nets[0], half, scaler, batch)
        sam_step(nets[1], single, batch)
    losses = [nn.functional.mse_loss(net(batch[0]), batch[1]).item() for net in nets]
    assert scaler.get_scale() == 1024.0
    assert losses[0] < 0.9 * before
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_an_infinite_gradient_skips_the_step() -> None:
    net, batch = mlp(), data()
    opt = SAM(BASES["sgd"](net.parameters()), rho=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaled_step(net, opt, scaler, batch)
    before = [p.detach().clone() for p in net.parameters()]
    scaled_step(net, opt, scaler, batch, poisoned="second")
    assert same_bits(net.parameters(), before)
    assert scaler.get_scale() == 512.0
    scaled_step(net, opt, scaler, batch)
    assert not same_bits(net.parameters(), before)


def test_an_infinite_gradient_of_the_first_pass_perturbs_nothing() -> None:
    """The step is then one of the base, with the gradient at the weights themselves."""
    nets, batch = (mlp(), mlp()), data()
    opts = [SAM(BASES["sgd"](net.parameters()), rho=rho) for net, rho in zip(nets, (0.05, 0.0), strict=True)]
    scalers = [torch.amp.GradScaler("cuda", init_scale=1024.0) for _ in nets]
    for net, opt, scaler, poisoned in zip(nets, opts, scalers, ("first", ""), strict=True):
        scaled_step(net, opt, scaler, batch, poisoned)
    for p, expected in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)  # a perturbed gradient is 1e-2 off
    assert [scaler.get_scale() for scaler in scalers] == [1024.0, 1024.0]
