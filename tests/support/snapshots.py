"""Whether a model, its gradients and the random generators are as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from models import raw, same_bits


def snapshot(net: nn.Module) -> dict[str, Any]:
    return {
        "tensors": [t.detach().clone() for t in net.state_dict().values()],
        "addresses": [t.data_ptr() for t in net.state_dict().values()],
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "flags": [p.requires_grad for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(x) for x in np.random.get_state()],  # noqa: NPY002
    }


def assert_as_before(net: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(net)
    assert same_bits(after["tensors"], before["tensors"])
    assert same_bits([after["random"]], [before["random"]])
    for a, b in zip(after["grads"], before["grads"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(raw(a), raw(b))
    assert all(after[key] == before[key] for key in ("addresses", "flags", "modes", "python", "numpy"))
