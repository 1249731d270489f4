"""PEFT: SAM moves what the optimizer trains, so that with LoRA the perturbation is in the adapters alone."""

from __future__ import annotations

import _toy
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

import flatmin


def train(net: nn.Module, data: list[_toy.Batch]) -> nn.Module:
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = flatmin.SAM(torch.optim.AdamW(trained, lr=0.01), rho=0.05, model=model)
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with opt.perturb():
            F.cross_entropy(model(x), y).backward()
        opt.step()
    return model


if __name__ == "__main__":
    _toy.show(train)
