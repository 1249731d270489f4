"""Hugging Face Trainer and Accelerate, around a tiny model of random weights: nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import SAM, PerturbedOPT
from plain_sam import difference, losses_of, moved, plain_sam, value

Load = Callable[[str], ModuleType]

trainer = pytest.mark.requires("transformers")
accelerate = pytest.mark.requires("accelerate")


class Classifier(nn.Module):
    """A model as the Trainer wants it: a dictionary in, loss and logits out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    base = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "lr_scheduler_type": "constant", "use_cpu": True}
    base |= {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 0.0}
    return TrainingArguments(output_dir=str(folder), train_sampling_strategy="sequential", **(base | options))


def examples(data: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for batch in data for x, y in zip(*batch, strict=True)]


def sgd_trainer(recipe: Load, net: nn.Module, folder: Path, data: Any, **options: Any) -> Any:
    classes = recipe("huggingface_trainer")
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return classes.SAMTrainer(
        Classifier(net), arguments(folder, **options), train_dataset=examples(data), optimizers=(SAM(base), None)
    )


@trainer
@accelerate
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_is_sam(recipe: Load, tmp_path: Path, clip: float, accumulate: int) -> None:
    toy = recipe("_toy")
    net, data = toy.net(), toy.batches(10)
    start = copy.deepcopy(net)
    run = sgd_trainer(recipe, net, tmp_path, data, max_grad_norm=clip, gradient_accumulation_steps=accumulate)
    run.train()
    steps = losses_of(data, accumulate)
    expected = plain_sam(start, steps, clip=clip or None, per_loss=True)
    assert moved(net, start) > 0.1
    assert difference(net, expected) < 1e-6
    first = sum(value(loss, start) for loss in steps[0]) / accumulate
    assert run.state.log_history[0]["loss"] == pytest.approx(first, rel=1e-3)  # the clean loss


@trainer
@accelerate
def test_the_trainers_own_optimizer_is_wrapped_and_a_run_resumes(recipe: Load, tmp_path: Path) -> None:
    classes, toy = recipe("huggingface_trainer"), recipe("_toy")
    data = toy.batches(8)

    def run(net: nn.Module, folder: str, **options: Any) -> Any:
        given = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.0} | options
        return classes.SAMTrainer(Classifier(net), arguments(tmp_path / folder, **given), train_dataset=examples(data))

    whole = toy.net()
    first = run(whole, "whole")
    first.train()
    assert isinstance(first.optimizer.optimizer, SAM)
    resumed = toy.net(seed=5)
    run(resumed, "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert difference(resumed, whole) == 0.0

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01, weight_decay=0.0)

    assert difference(whole, plain_sam(toy.net(), losses_of(data), adam)) < 1e-5


@trainer
@accelerate
def test_the_trainer_with_noise(recipe: Load, tmp_path: Path) -> None:
    """``prepare()`` makes ``type(state_dict)({...})``, which a nested checkpoint once refused."""
    classes, toy = recipe("huggingface_trainer"), recipe("_toy")
    net, twin, data = toy.net(), toy.net(), toy.batches(6)

    def optimizer(model: nn.Module) -> PerturbedOPT:
        generator = torch.Generator().manual_seed(3)
        return PerturbedOPT(torch.optim.SGD(model.parameters(), lr=0.1), scale=0.05, generator=generator)

    run = classes.NoiseTrainer(
        Classifier(net), arguments(tmp_path), train_dataset=examples(data), optimizers=(optimizer(net), None)
    )
    run.train()
    opt = optimizer(twin)
    for x, y in data:
        opt.zero_grad()
        with opt.perturb():
            F.cross_entropy(twin(x), y).backward()
        opt.step()
    assert opt._set.draws > 0
    assert difference(net, twin) < 1e-7 and moved(net, toy.net()) > 0.05


@trainer
@accelerate
@pytest.mark.requires("schedulefree")
def test_the_trainer_switches_a_schedule_free_base(recipe: Load, tmp_path: Path) -> None:
    """``train()`` and ``eval()`` of the base are reached: its averaged weights are evaluated and saved."""
    from schedulefree import AdamWScheduleFree

    classes, toy = recipe("huggingface_trainer"), recipe("_toy")
    net, twin, data = toy.net(), toy.net(), toy.batches(6)
    sam = SAM(AdamWScheduleFree(net.parameters(), lr=0.01))
    run = classes.SAMTrainer(Classifier(net), arguments(tmp_path), train_dataset=examples(data), optimizers=(sam, None))
    run.train()
    sam.eval()
    recipe("other_bases").schedule_free(twin, data)
    assert difference(net, twin) < 1e-7 and moved(net, toy.net()) > 0.01


@accelerate
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_accelerate_loop_is_sam(recipe: Load, accumulate: int) -> None:
    loop, toy = recipe("accelerate_loop"), recipe("_toy")
    net, data = toy.net(), toy.batches(10)
    start = copy.deepcopy(net)
    loop.train(net, data, accumulate=accumulate)
    expected = plain_sam(start, losses_of(data, accumulate), clip=1.0, per_loss=True)
    assert moved(net, start) > 0.1 and difference(net, expected) < 1e-6


@accelerate
@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_prepare_takes_the_wrapper(recipe: Load, wrap: Any) -> None:
    from accelerate import Accelerator

    net = recipe("_toy").net()
    opt = wrap(torch.optim.AdamW(net.parameters()))
    _, prepared = Accelerator(cpu=True).prepare(net, opt)
    assert prepared.optimizer is opt
    prepared.load_state_dict(prepared.state_dict())
