"""fastai: a callback of one method around a torch optimizer in ``OptimWrapper``.

fastai logs the loss of the first pass. With mixed precision (``MixedPrecision`` scales in a callback of its own) use
bf16, ``learn.to_bf16()``, which needs no scaler.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import _toy
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

import flatmin


class SecondPass(Callback):
    """Runs the second pass after fastai's own, before anything clips or steps."""

    order = -10

    def after_backward(self) -> None:
        learn = self.learn
        with learn.opt.opt.perturb():
            learn.loss_func(learn.model(*learn.xb), *learn.yb).backward()


def sharpness_aware(params: Any, lr: float = 0.1, **options: Any) -> OptimWrapper:
    """For ``Learner(opt_func=...)``."""
    return OptimWrapper(params, partial(flatmin.SAM, base=torch.optim.SGD), lr=lr, **options)


def train(net: nn.Module, data: list[_toy.Batch]) -> None:
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    learn = Learner(
        DataLoaders(loader, loader),
        net,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(sharpness_aware, rho=0.05, momentum=0.9),
        cbs=SecondPass(),
        lr=0.1,
        wd=0.0,
        train_bn=True,
    )
    learn.remove_cbs(learn.cbs.filter(lambda cb: cb.name in ("progress", "recorder")))
    learn.fit(1)


if __name__ == "__main__":
    _toy.show(train)
