"""Lightning with gradient accumulation: ``opt.backward`` adds the SAM gradient of each micro-batch to ``.grad``."""

from __future__ import annotations

import _toy
import lightning
import torch
import torch.nn.functional as F
from lightning_automatic import trainer
from torch import Tensor, nn

import flatmin


class SharpnessAware(lightning.LightningModule):
    """Any module, trained by SAM, with one step for ``accumulate`` batches."""

    def __init__(self, net: nn.Module, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.accumulate = net, accumulate

    def training_step(self, batch: _toy.Batch, index: int) -> None:
        x, y = batch
        opt = self.optimizers()

        def loss() -> Tensor:  # with precision "16-mixed" give backward() scaler=self.trainer.precision_plugin.scaler
            return F.cross_entropy(self.net(x), y) / self.accumulate

        if index % self.accumulate == 0:
            opt.zero_grad()
        clean = opt.backward(loss)  # both passes
        if (index + 1) % self.accumulate == 0:
            opt.step()
        self.log("train_loss", clean * self.accumulate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return flatmin.SAM(torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=self.net)


def train(net: nn.Module, data: list[_toy.Batch], accumulate: int = 2) -> None:
    trainer().fit(SharpnessAware(net, accumulate), torch.utils.data.DataLoader(data, batch_size=None))


if __name__ == "__main__":
    _toy.show(train)
