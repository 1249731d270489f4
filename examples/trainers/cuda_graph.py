"""CUDA graphs: a whole SAM step, both passes and the update, as one launch. Needs a GPU.

The graph works on memory of its own: a batch is copied into it, and so are radius and rate before each replay, so that
a scheduler on ``base`` and a new ``rho`` count. Everything else is fixed at capture: momentum, weight decay, the shape
of the batch, which parameters are trained. Buffers of the net, as BatchNorm's, are those of the first pass.

What cannot be captured is refused: an optimizer that counts its steps, as Adam, has the counters on the host, where a
replay does not reach them. Nor does it reach what else happens in Python between the operators: hooks, a GradScaler
that skips a step, a batch of another shape.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import _toy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import ops

FIXED = ("momentum", "weight_decay", "nesterov")
WARM_UPS = 3  # torch asks for some on another stream: they load kernels and libraries, which a capture must not


class GraphedSAM:
    """SAM around SGD for batches of one shape: ``step(x, y)`` is what ``opt.step(closure)`` of ``flatmin.SAM`` is.

    Args:
        net, loss_fn: the loss is ``loss_fn(net(x), y)``.
        base: a ``torch.optim.SGD`` with one group. Its state holds the momentum, so that its ``state_dict()`` is the
            checkpoint.
        rho: the radius; ``step.rho`` may be changed at any time.
        batch: for the shapes.
    """

    def __init__(
        self, net: nn.Module, loss_fn: Callable[..., Tensor], base: torch.optim.Optimizer, rho: float, batch: _toy.Batch
    ) -> None:
        check_base(base)
        self.net, self.loss_fn, self.rho = net, loss_fn, rho
        self.group: dict[str, Any] = base.param_groups[0]
        self.params = [p for p in self.group["params"] if p.requires_grad]
        self.device = self.params[0].device
        self.fixed = self._options()
        self.momenta: list[Tensor] = []
        if self.group["momentum"]:
            for p in self.params:  # torch's first step makes them the gradient, which is what 0 gives
                if base.state[p].get("momentum_buffer") is None:
                    base.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.momenta.append(base.state[p]["momentum_buffer"])
        self.x, self.y = (t.to(self.device, copy=True) for t in batch)
        self.radius, self.rate = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(2))
        self.loss = torch.zeros((), device=self.device)
        self.backup = ops.backup_like(self.params)
        self.buffers = list(net.buffers())
        self.saved = [b.clone() for b in self.buffers]
        self.graph: torch.cuda.CUDAGraph | None = None

    def _options(self) -> dict[str, Any]:
        return {name: self.group[name] for name in FIXED}

    def run(self) -> None:
        """The step itself, operator by operator: what the graph records."""
        loss = self.loss_fn(self.net(self.x), self.y)
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            self.loss.copy_(loss)
            for saved, b in zip(self.saved, self.buffers, strict=True):
                saved.copy_(b)
        ops.sam_ascend_(self.params, grads, self.backup, ops.norm(grads), self.radius)
        grads = torch.autograd.grad(self.loss_fn(self.net(self.x), self.y), self.params)
        with torch.no_grad():
            for b, saved in zip(self.buffers, self.saved, strict=True):
                b.copy_(saved)
        ops.restore_sgd_(self.params, grads, self.momenta, self.backup, self.rate, **self.fixed)

    def capture(self) -> None:
        """Record the step. Weights, momentum and buffers are afterwards what they were."""
        if self.device.type != "cuda":
            raise RuntimeError(f"capture: the parameters are on {self.device}; CUDA graphs need a GPU, net.cuda()")
        state = [*self.params, *self.momenta, *self.buffers]
        before = [t.detach().clone() for t in state]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        with torch.no_grad():
            for t, b in zip(state, before, strict=True):
                t.copy_(b)
        self.graph = graph

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step: replayed after :meth:`capture`, else as it is. Returns the clean loss, until the next step."""
        for name, given, static in (("x", x, self.x), ("y", y, self.y)):
            if given.shape != static.shape:
                raise ValueError(
                    f"{name}: shape {tuple(given.shape)} given; the step is for {tuple(static.shape)}. Leave a smaller "
                    "last batch out: DataLoader(drop_last=True)"
                )
            static.copy_(given, non_blocking=True)
        if self._options() != self.fixed:
            raise RuntimeError(f"{self._options()} is not what the step was made with, {self.fixed}; make a new one")
        self.radius.fill_(self.rho)
        self.rate.fill_(self.group["lr"])
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.loss


def check_base(base: torch.optim.Optimizer) -> None:
    """``ValueError`` for a base whose step a graph cannot hold."""
    if type(base) is not torch.optim.SGD:
        raise ValueError(
            f"base: {type(base).__name__} given; give torch.optim.SGD. Others, as Adam, count their steps on the host, "
            "and a replay would repeat the correction of the step that was captured"
        )
    if len(base.param_groups) != 1:
        raise ValueError(f"base: has {len(base.param_groups)} groups; this recipe has one rate for all of them")
    group = base.param_groups[0]
    for name in ("dampening", "maximize"):
        if group[name]:
            raise ValueError(f"base: {name}={group[name]!r} given; this recipe is for SGD without it")


def train(net: nn.Module, data: list[_toy.Batch]) -> None:
    base = torch.optim.SGD(net.cuda().parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, len(data))
    step = GraphedSAM(net, F.cross_entropy, base, 0.05, data[0])
    step.capture()
    for x, y in data:
        step(x, y)
        base._opt_called = True  # else the scheduler warns: it is the graph that has stepped
        scheduler.step()
    net.cpu()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("cuda_graph.py: needs a GPU that torch sees (torch.cuda.is_available() is False); nothing was trained")
    _toy.show(train)
