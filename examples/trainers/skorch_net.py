"""skorch: SAM by name, with its base as an option; skorch's closure runs twice and the history has the clean loss.

On a net that is initialised, ``net.set_params(optimizer__sam_rho=0.1)`` changes the radius; ``optimizer__rho`` writes a
key that nobody would read, and the next step says so.
"""

from __future__ import annotations

import _toy
import torch
from skorch import NeuralNetClassifier
from torch import nn

import flatmin


def classifier(net: nn.Module) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        net,
        criterion=nn.CrossEntropyLoss,
        optimizer=flatmin.SAM,
        optimizer__base=torch.optim.SGD,
        optimizer__rho=0.05,
        optimizer__momentum=0.9,
        lr=0.1,
        max_epochs=1,
        batch_size=16,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
    )


def train(net: nn.Module, data: list[_toy.Batch]) -> NeuralNetClassifier:
    model = classifier(net)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    return model.fit(x, y)


if __name__ == "__main__":
    _toy.show(train)
