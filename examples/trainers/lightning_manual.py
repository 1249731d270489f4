"""Lightning with manual optimization: the README's loop, for every precision, 16-mixed and clipping among them.

Lightning unscales after ``training_step``'s last backward, within ``opt.step()``: clip in ``on_before_optimizer_step``,
where the weights are back and the gradients unscaled.
"""

from __future__ import annotations

from typing import Any

import _toy
import lightning
import torch
import torch.nn.functional as F
from lightning_automatic import trainer
from torch import nn

import flatmin


class SharpnessAware(lightning.LightningModule):
    """Any module, trained by SAM."""

    def __init__(self, net: nn.Module, clip: float = 1.0, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.clip, self.accumulate = net, clip, accumulate

    def training_step(self, batch: _toy.Batch, index: int) -> None:
        x, y = batch
        opt = self.optimizers()
        opt.zero_grad()
        loss = F.cross_entropy(self.net(x), y)
        self.manual_backward(loss)
        with opt.perturb():
            self.manual_backward(F.cross_entropy(self.net(x), y))
        opt.step()
        self.log("train_loss", loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return flatmin.SAM(torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=self.net)


def train(net: nn.Module, data: list[_toy.Batch], **options: Any) -> None:
    trainer(**options).fit(SharpnessAware(net), torch.utils.data.DataLoader(data, batch_size=None))


if __name__ == "__main__":
    _toy.show(train)
