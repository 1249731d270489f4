"""Lightning with automatic optimization, for fp32 and bf16-mixed: ``opt.step(closure)`` runs ``training_step`` twice.

Nothing but ``configure_optimizers`` has to change. Two things are worth knowing:

* ``self.log`` in ``training_step`` logs both passes, and Lightning reports their mean. The loss at the weights
  themselves is what ``optimizer.step`` returns: :meth:`SharpnessAware.optimizer_step` logs that.
* ``accumulate_grad_batches`` above 1 raises: see ``lightning_accumulation.py``. With precision "16-mixed" Lightning
  runs the closure once, before the step, and no optimizer can run it again: SAM warns that this is plain training,
  and :meth:`SharpnessAware.optimizer_step` has no loss to log. See ``lightning_manual.py``.
"""

from __future__ import annotations

from typing import Any

import _toy
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin


class SharpnessAware(lightning.LightningModule):
    """Any module, trained by SAM."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: _toy.Batch, index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        self.log("train_loss", optimizer.step(closure=closure))  # of the first pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return flatmin.SAM(torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=self.net)


def trainer(**options: Any) -> lightning.Trainer:
    """A trainer that writes nothing; yours has more options."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(max_epochs=1, accelerator="cpu", **(quiet | options))


def train(net: nn.Module, data: list[_toy.Batch], **options: Any) -> dict[str, Tensor]:
    fit = trainer(**options)
    fit.fit(SharpnessAware(net), torch.utils.data.DataLoader(data, batch_size=None))
    return dict(fit.callback_metrics)


if __name__ == "__main__":
    _toy.show(train)
