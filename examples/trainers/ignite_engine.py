"""ignite: both passes in the update function. Its output, for metrics and loggers, is the clean loss."""

from __future__ import annotations

import _toy
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from torch import Tensor, nn

import flatmin


def train(net: nn.Module, data: list[_toy.Batch]) -> list[float]:
    opt = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=net)

    def update(engine: Engine, batch: _toy.Batch) -> float:
        net.train()
        x, y = batch

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        return opt.step(closure).item()

    engine, losses = Engine(update), list[float]()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(engine.state.output))
    engine.run(data, max_epochs=1)
    return losses


if __name__ == "__main__":
    _toy.show(train)
