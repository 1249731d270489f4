"""On a GPU: launches, waiting, captured draws, memory and mixed precision of the noise. test_cuda.py has its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flatmin import PerturbedOPT, ops
from gpu_runs import BASES, DEVICE, HOST, captured, data, launches, mlp, no_waiting, sam_step
from models import same_bits
from operator_runs import problem_on
from problems import filled, large_problem

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(("tensors", "per_pass"), [(213, 1), (251, 2)])
def test_a_pass_of_the_noise_is_one_launch(tensors: int, per_pass: int) -> None:
    """With the fold of its tally; PACGen and filter norms have a result for each tensor, folded launch by launch."""
    params, grads, buffers, h = ([torch.ones(1000, device=DEVICE) for _ in range(tensors)] for _ in range(4))
    backup, key = ops.backup_like(params), ops.random_key(1, device=DEVICE)
    corrections = torch.ones(2, dtype=torch.float64, device=DEVICE)
    summed = {"update": per_pass, "fold": 1}
    assert launches(lambda: ops.scaled_noise_(params, backup, key, scale=0.1, gamma=0.1, curvatures=h)) == summed
    averaged = (buffers, h, [], backup, 0.1, corrections)
    assert launches(lambda: ops.restore_sgd_curvature_(params, grads, *averaged, momentum=0.9)) == summed
    assert launches(lambda: ops.curvature_(h, grads, decay=0.9)) == summed
    assert launches(lambda: ops.probe_(params, key)) == {"update": per_pass}
    rows = {"reduce": per_pass, "fold_rows": per_pass}
    assert launches(lambda: ops.pacgen(params, h)) == rows
    assert launches(lambda: ops.filter_norm(params)) == rows


@pytest.mark.parametrize("place", [None, HOST, DEVICE], ids=["float", "on the host", "on the device"])
def test_operators_of_the_noise_do_not_wait(place: torch.device | None) -> None:
    scale = 0.05 if place is None else torch.tensor(0.05, device=place)
    problem = problem_on(DEVICE, large_problem(torch.float32))
    params, grads, backup = problem.params, problem.grads, problem.backup()
    buffers, h = problem.state(1), problem.state(2, positive=True)
    key, corrections = ops.random_key(1, device=DEVICE), torch.ones(2, dtype=torch.float64, device=DEVICE)

    def run() -> None:
        ops.scaled_noise_(
            params, backup, key, distribution="normal", scale=scale, gamma=0.1, curvatures=h, lipschitz=scale
        )
        ops.restore_sgd_curvature_(params, grads, buffers, h, [], backup, scale, corrections, momentum=0.9)
        ops.curvature_(h, grads, decay=0.9)
        ops.probe_(grads, key)
        ops.pacgen(params, h, lipschitz=scale)
        ops.filter_norm(params)

    run()
    with no_waiting():
        run()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"lipschitz": "element"}, {"sizing": "filter", "distribution": "normal"}], ids=str
)
def test_a_step_under_noise_does_not_wait(options: dict[str, Any], base: str) -> None:
    """Nor does the question whether something was not finite, which is asked a step or two late."""
    net, batch = mlp(), data()
    opt = PerturbedOPT(BASES[base](net.parameters()), scale=1e-3, **options)
    for _ in range(3):  # the first has no noise, the second makes the backup
        sam_step(net, opt, batch)
    with no_waiting():
        sam_step(net, opt, batch)
    assert all(p.isfinite().all() for p in net.parameters())


def test_captured_noise_is_drawn_anew_at_each_replay() -> None:
    """The key is advanced on the device, within the graph."""
    weights, h = ([filled((4097,), torch.float32, seed).abs_().to(DEVICE)] for seed in (1, 2))
    options: dict[str, Any] = {"distribution": "normal", "scale": 0.5, "gamma": 0.5, "eps": 0.25, "curvatures": h}
    params, backup, key = [weights[0].clone()], ops.backup_like(weights), ops.random_key(3, device=DEVICE)
    noisy = torch.empty_like(weights[0])

    def run() -> None:
        ops.scaled_noise_(params, backup, key, lipschitz=2.0, **options)
        noisy.copy_(params[0])
        ops.restore_(params, backup)
        key.view(torch.int32)[2].add_(1)

    graph = captured(run)
    key.copy_(ops.random_key(3))
    for draw in range(3):
        graph.replay()
        expected = [weights[0].clone()]
        ops.scaled_noise_(
            expected, ops.backup_like(weights), ops.random_key(3, draw, device=DEVICE), lipschitz=2.0, **options
        )
        assert same_bits([noisy], expected)
        assert same_bits(params, weights)
    assert not same_bits([noisy], weights)


def test_noise_holds_one_copy_of_the_parameters_too() -> None:
    """Beside momentum and the average of the curvature; a step takes nothing more."""
    params = [nn.Parameter(torch.ones(1024, 1024, device=DEVICE)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    size, before = sum(p.nbytes for p in params), torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
    opt = PerturbedOPT(BASES["sgd"](params), scale=1e-3)
    for _ in range(2):  # the first has no noise
        opt.ascend()
        opt.step()
    held = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats(DEVICE)
    opt.ascend()
    opt.step()
    peak = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"]
    assert 3 * size <= held - before <= 3.01 * size
    assert peak - held <= 0.01 * size


def test_grad_scaler_trains_under_noise() -> None:
    """Both runs draw the same noise, so they differ by half precision alone."""
    nets, batch = (mlp(), mlp()), data()
    opts = [
        PerturbedOPT(BASES["sgd"](net.parameters()), scale=1e-3, generator=torch.Generator().manual_seed(7))
        for net in nets
    ]
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = nn.functional.mse_loss(nets[0](batch[0]), batch[1]).item()
    for _ in range(10):
        opts[0].zero_grad()
        with opts[0].perturb(), torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(nets[0](batch[0]).float(), batch[1])
            scaler.scale(loss).backward()
        scaler.step(opts[0])
        scaler.update()
        sam_step(nets[1], opts[1], batch)
    losses = [nn.functional.mse_loss(net(batch[0]), batch[1]).item() for net in nets]
    assert scaler.get_scale() == 1024.0
    assert losses[0] < 0.9 * before
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
