"""opacus: sharpness-aware training that keeps the privacy guarantee (DPSAT, Park et al., ICML 2023, arXiv 2306.05651).

SAM's own two passes around ``DPOptimizer`` compute what they should, but they are NOT private: the perturbation is a
function of the batch, and neither clipping nor noise covers it. DPSAT perturbs by the private gradient of the step
before, which the guarantee covers already. It is still in ``.grad``, so that nothing is cleared before ``perturb()``,
and one pass is enough. The first step has no such gradient and is the bare optimizer's.
"""

from __future__ import annotations

import warnings

import _toy
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import nn

import flatmin


def train(net: nn.Module, data: list[_toy.Batch], noise: float = 1.0, clip: float = 1.0) -> nn.Module:
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    size = len(data[0][0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus: its secure random numbers are off, which is fine for a try
        model, base, loader = PrivacyEngine().make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=clip,
            poisson_sampling=False,  # leave this out: with it batches are drawn as the guarantee wants them
        )
    opt = flatmin.SAM(base, rho=0.05)
    for x, y in loader:
        with opt.perturb():  # by the private gradient of the last step; clears it
            F.cross_entropy(model(x), y).backward()
        opt.step()
    return model


if __name__ == "__main__":
    _toy.show(train)
