"""Hugging Face Trainer: two methods of it. Accumulation, clipping, mixed precision and schedulers stay the Trainer's.

Each micro-batch of ``gradient_accumulation_steps`` gets its own perturbation. The loss that the Trainer logs is the
one at the weights themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

import flatmin


class SAMTrainer(Trainer):
    """A Trainer whose optimizer, whichever ``args.optim`` says, is wrapped in SAM."""

    sam_options: dict[str, Any] = {"rho": 0.05}  # noqa: RUF012 - a subclass's or an instance's to replace

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)
        if not isinstance(self.optimizer, flatmin.SAM):
            self.optimizer = flatmin.SAM(self.optimizer, **self.sam_options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        sam = self.optimizer.optimizer  # within Accelerate's wrapper, which forwards no methods
        if hasattr(sam, "train"):  # of a schedule-free base
            sam.train()
        inputs = self._prepare_inputs(inputs)
        scaled_already = (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func is not None

        def loss() -> Tensor:
            with self.compute_loss_context_manager():
                value = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return value if scaled_already else value / self.current_gradient_accumulation_steps

        return sam.backward(loss, scaler=self.accelerator.scaler)


class NoiseTrainer(Trainer):
    """A Trainer that trains under noise: one pass."""

    noise_options: dict[str, Any] = {"gamma": 0.1, "scale": 0.01}  # noqa: RUF012

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        super().create_optimizer(model)
        if not isinstance(self.optimizer, flatmin.PerturbedOPT):
            self.optimizer = flatmin.PerturbedOPT(self.optimizer, **self.noise_options)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.optimizer.optimizer.perturb():
            return super().training_step(*args, **kwargs)
