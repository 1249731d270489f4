"""Accelerate: ``prepare()`` wraps the optimizer once more and forwards no methods, so SAM's own variable stays in use.

``accelerator.accumulate`` makes ``step`` and ``zero_grad`` wait for the last micro-batch, and ``opt.backward`` adds to
what the earlier ones left. Without accumulation the README's loop does as well: ``with sam.perturb(): ...``.
"""

from __future__ import annotations

import _toy
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import flatmin


def train(net: nn.Module, data: list[_toy.Batch], accumulate: int = 1, clip: float = 1.0) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    sam = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=net)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    model, opt, loader = accelerator.prepare(net, sam, loader)
    for x, y in loader:
        with accelerator.accumulate(model):

            def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
                with accelerator.autocast():
                    return F.cross_entropy(model(x), y) / accumulate

            sam.backward(loss, scaler=accelerator.scaler)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()


if __name__ == "__main__":
    _toy.show(train)
