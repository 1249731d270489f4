"""timm: its optimizers by name, its scaler with clipping, its moving average of the weights.

``NativeScaler`` has backward and step in one call. The call with ``need_update=False`` is the first backward alone; the
second call unscales, clips and calls ``opt.step()``, which moves the weights back before it steps. Should the scaler
find an overflow, the weights come back as well, and nothing is stepped.
"""

from __future__ import annotations

import _toy
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn

import flatmin


def train(
    net: nn.Module, data: list[_toy.Batch], device: str = "cpu", dtype: torch.dtype = torch.bfloat16, clip: float = 1.0
) -> ModelEmaV3:
    base = create_optimizer_v2(net, opt="momentum", lr=0.1, weight_decay=1e-4, momentum=0.9)
    opt = flatmin.SAM(base, rho=0.05, model=net)
    scaler, ema = NativeScaler(device=device), ModelEmaV3(net, decay=0.9)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return F.cross_entropy(net(x), y)

    for x, y in data:
        opt.zero_grad()
        scaler(loss_of(x, y), opt, need_update=False)  # backward alone
        opt.ascend()
        opt.zero_grad()
        scaler(loss_of(x, y), opt, clip_grad=clip, parameters=net.parameters())  # backward, clip, back to w, step
        ema.update(net)
    return ema


if __name__ == "__main__":
    _toy.show(train)
