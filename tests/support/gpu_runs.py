"""What the tests on a GPU share: the device, ways to see launches and waiting, a small network and its steps."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flatmin import SAM, PerturbedOPT
from problems import filled

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)

#: How long the device is kept busy where a test looks whether the host waits for it: a tenth of a second at 2 GHz, and
#: a step takes the host a few milliseconds.
BUSY_CYCLES = 200_000_000


def launches(run: Callable[[], object]) -> Counter[str]:
    """Our kernels that ran, by kind."""
    run()  # the first call loads the kernels
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    ours = re.compile(r"fm_(?:plain_)?(reduce|fold|fold_rows|update)_kernel")
    found = (ours.search(event.name) for event in profiler.events())
    return Counter(match.group(1) for match in found if match)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Fails if torch knows of a synchronisation inside, or if the device, kept busy, is done when the host is."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(BUSY_CYCLES)
        yield
        assert not torch.cuda.current_stream().query(), "the host waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Matrices and vectors, the same values on every call."""
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(0.1 * filled(p.shape, torch.float32, i))
    return net.to(DEVICE, dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(filled(shape, dtype, seed).to(DEVICE) for seed, shape in enumerate([(32, 64), (32, 10)]))  # type: ignore[return-value]


def sam_step(net: nn.Module, opt: SAM | PerturbedOPT, batch: tuple[Tensor, Tensor]) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.mse_loss(net(batch[0]), batch[1])
        loss.backward()
        return loss

    opt.step(closure)


BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params),
}


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of ``run``, which is called on another stream before, as torch asks for."""
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
