"""Optimizers in threads, forked processes and the workers of a DataLoader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin import SAM, LabelNoise, PerturbedOPT, ops

LARGE = 300_000  # elements: more than one thread's share


def sam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SAM(torch.optim.AdamW(params, lr=0.01), rho=0.1)


def perturbed(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return PerturbedOPT(torch.optim.SGD(params, lr=0.1, momentum=0.9), gamma=0.1, scale=0.1)


def problem(seed: int) -> tuple[list[nn.Parameter], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(LARGE, generator=generator)
    return [nn.Parameter(torch.randn(LARGE, generator=generator))], target


def train(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], seed: int, steps: int = 10) -> Tensor:
    """The weights after so many steps. Elementwise, so that the bits hang on no thread count of torch's."""
    params, target = problem(seed)
    opt = make(params)
    for _ in range(steps):
        params[0].grad = (params[0].detach() - target).tanh()
        with opt.perturb():
            params[0].grad = (params[0].detach() - target).tanh()
        opt.step()
    return params[0].detach()


def test_two_models_in_two_threads(restore_threads: None) -> None:
    torch.set_num_threads(2)
    jobs = [(sam, 1), (perturbed, 2), (sam, 3), (perturbed, 4)]
    alone = [train(make, seed) for make, seed in jobs]
    together: dict[int, Tensor] = {}

    def run(i: int) -> None:
        together[i] = train(*jobs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[i], alone[i]) for i in range(len(jobs)))


def in_child(action: Callable[[], bool]) -> int:
    """0 if ``action`` gave True in a forked process; a signal's negative number if it waited for ever."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            code = 0 if action() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_a_process_that_used_the_kernels(restore_threads: None) -> None:
    """GNU's OpenMP has no threads there and waits for them; torch's own operators do so, which this does not call."""
    torch.set_num_threads(2)
    params, target = problem(5)
    grads = [params[0].detach() - target, params[0].detach() * 0.5]
    start = params[0].detach().clone()
    opt = sam(params)

    def step() -> Tensor:
        for k, part in enumerate(grads):
            params[0].grad = part
            if k == 0:
                opt.ascend()
        opt.step()
        return params[0].detach()

    second = step().clone()
    third = step().clone()
    assert not torch.equal(second, third)
    params[0].data, opt = start.clone(), sam(params)
    step()
    backup = ops.backup_like(params)

    def goes_on() -> bool:
        step()
        torch.ops.flatmin.save_(params, backup)
        torch.set_num_threads(1)  # what a child does that calls torch
        return torch.equal(params[0].detach(), third)

    assert in_child(goes_on) == 0
    assert torch.equal(step(), third)  # the parent too


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_trains_after_set_num_threads(restore_threads: None) -> None:
    torch.set_num_threads(2)
    alone = train(sam, 6)

    def trains() -> bool:
        torch.set_num_threads(1)
        return torch.equal(train(sam, 6), alone)

    assert in_child(trains) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_workers_that_corrupt_labels(restore_threads: None) -> None:
    """Workers are forked from a process that used the kernels, and draw the labels that it would have drawn itself."""
    torch.set_num_threads(2)
    train(sam, 7, steps=1)
    clean = torch.arange(200) % 10
    noisy = LabelNoise(10, 0.4, "exclude_true", generator=torch.Generator().manual_seed(3)).wrap(
        TensorDataset(torch.zeros(200, 1), clean)
    )
    here = torch.tensor([int(noisy[i][1]) for i in range(200)])
    loader = DataLoader(noisy, batch_size=20, num_workers=2, multiprocessing_context="fork", timeout=60)
    there = torch.cat([y for _, y in loader])
    assert torch.equal(there, here) and not torch.equal(here, clean)
