"""One fine-tuning run: everything that a checkpoint holds, its epochs, and what it measures."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import flatmin
from _common.errors import UsageError
from _common.files import in_one_step
from _common.runs import Log, Run, seed_of
from flatmin import curvature, sharpness

from . import models
from .data import Data, View, loader
from .place import Place
from .probe import outputs

SOFT = ("smooth", "gaussian")  #: kinds of noise that make soft targets, anew for every batch
TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_noise(s: SimpleNamespace, classes: int) -> flatmin.LabelNoise | None:
    """The noise of a run: a function of its seed, so that every method of a comparison sees the same wrong labels."""
    if not s.label_noise:
        return None
    generator = torch.Generator().manual_seed(seed_of(s.seed, "noise"))
    try:
        return flatmin.LabelNoise(classes, s.label_noise, s.kind, generator=generator)
    except ValueError as error:
        raise UsageError(f"--label-noise {s.label_noise} --kind {s.kind}: {error}") from error


def given_labels(s: SimpleNamespace, noise: flatmin.LabelNoise | None, clean: Tensor) -> Tensor:
    """The labels to train on, of which noise has made some wrong, once and for all."""
    if noise is None or s.fresh_noise or s.kind in SOFT:
        return clean
    return noise.corrupt(clean)


def make_optimizer(s: SimpleNamespace, model: nn.Module) -> torch.optim.Optimizer:
    """The base that ``--optimizer`` names in torch.optim, plain or wrapped."""
    base_class = getattr(torch.optim, s.optimizer, None)
    if not (isinstance(base_class, type) and issubclass(base_class, torch.optim.Optimizer)):
        raise UsageError(f"--optimizer {s.optimizer}: torch.optim has no such class; SGD, AdamW and RMSprop are there")
    step = inspect.signature(base_class.step).parameters.get("closure")
    if (step is not None and step.default is inspect.Parameter.empty) or s.optimizer == "SparseAdam":
        reason = "takes sparse gradients alone" if s.optimizer == "SparseAdam" else "calls its closure as it likes"
        raise UsageError(f"--optimizer {s.optimizer}: {reason}; give another, such as SGD or AdamW")
    options: dict[str, Any] = {"lr": s.lr}
    if s.optimizer == "SGD":
        options |= {"momentum": 0.9, "weight_decay": 1e-5}  # Foret et al. 2020, fine-tuning
    for text in s.optimizer_args:
        name, _, value = text.partition("=")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UsageError(f"--optimizer-args {text}: give name=number, such as weight_decay=1e-4") from None
    try:
        base = base_class(model.parameters(), **options)
        # BatchNorm that learns its statistics must not count SAM's second pass.
        if s.method == "sam":
            counted = None if s.batchnorm == "frozen" else model
            return flatmin.SAM(base, rho=s.rho, adaptive=s.adaptive, model=counted)
        if s.method == "popt":  # has no other pass: trained statistics follow the perturbed weights
            return flatmin.PerturbedOPT(base, gamma=s.gamma)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {s.optimizer}, --method {s.method}: {error}") from error
    return base


def rate(s: SimpleNamespace, steps: int) -> Any:
    """Factor on the learning rate at a step: a linear rise over the first epochs, then half a cosine."""
    rising = round(s.warmup * steps)
    rest = max(1, s.epochs * steps - rising)

    def factor(step: int) -> float:
        return (step + 1) / (rising + 1) if step < rising else 0.5 + 0.5 * math.cos(math.pi * (step - rising) / rest)

    return factor


class Learner:
    """Model, optimizer, schedule, averaged weights, noise and history of a run.

    Every random number is a function of the seed and of epoch and image, so a run that is loaded from a checkpoint
    goes on to the same bits.

    Args:
        run: its settings are those of the command line.
        data: training and test images.
        place: device and processes.
    """

    def __init__(self, run: Run, data: Data, place: Place) -> None:
        self.s = s = SimpleNamespace(**run.settings)
        self.data, self.place = data, place
        self.size = min(s.batch_size, len(data.train.labels))
        self.steps = len(data.train.labels) // self.size
        if self.size % (place.world * s.accumulate):
            raise UsageError(
                f"--batch-size {self.size} (at most the number of images) must be a multiple of {place.world} "
                f"processes times --accumulate {s.accumulate}"
            )
        torch.manual_seed(seed_of(s.seed, "weights"))
        self.model = models.create(s.model, s.weights, len(data.classes), s.dropout).to(place.device)
        self.mean, self.std = models.moments(self.model, place.device)
        self.optimizer = make_optimizer(s, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate(s, self.steps))
        self.amp = TYPES[s.amp]
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=s.amp == "fp16")
        self.average = None
        if s.ema:
            self.average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema), use_buffers=s.batchnorm == "trained"
            )
        self.noise = make_noise(s, len(data.classes))
        self.labels = given_labels(s, self.noise, data.train.labels)
        self.wrong = self.labels != data.train.labels
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors, numbers, lists and dictionaries."""
        return {
            "epoch": len(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "noise": None if self.noise is None else self.noise.state_dict(),
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None]})
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.noise is not None:
            self.noise.load_state_dict(state["noise"])
        self.history = list(state["history"])

    # ---- training ----

    def _prepare(self, epoch: int) -> nn.Module:
        """Freeze what this epoch does not train; the module to call, which averages gradients over processes."""
        head_only = epoch < self.s.head_epochs
        self.model.requires_grad_(not head_only)
        for p in models.head(self.model):
            p.requires_grad_(True)
        self.model.train()
        if head_only or self.s.batchnorm == "frozen":
            for layer in models.batchnorms(self.model):
                layer.eval()
        if self.place.world == 1:
            return self.model
        cuda = self.place.device.type == "cuda"
        return DistributedDataParallel(self.model, device_ids=[self.place.device.index] if cuda else None)

    def _batches(self, epoch: int) -> list[Tensor]:
        """Positions of the images of every step that this process takes; an incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(seed_of(self.s.seed, "order", epoch))
        order = torch.randperm(len(self.labels), generator=generator)[: self.steps * self.size]
        return [batch[self.place.rank :: self.place.world] for batch in order.split(self.size)]

    def _targets(self, rows: Tensor) -> Tensor:
        """Labels int64 [N], or soft targets [N, C], of the images at ``rows``."""
        labels = self.labels[rows]
        if self.noise is None or not (self.s.fresh_noise or self.s.kind in SOFT):
            return labels
        return self.noise(labels, index=rows)

    def _gradient(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean loss to ``.grad``, in ``--accumulate`` pieces. Returns loss and logits."""
        total, logits = torch.zeros((), device=x.device), []
        pieces = list(zip(x.chunk(self.s.accumulate), y.chunk(self.s.accumulate), strict=True))
        for i, (images, targets) in enumerate(pieces):
            waits = i + 1 < len(pieces) and isinstance(module, DistributedDataParallel)
            with module.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
                    output = module(images)
                loss = F.cross_entropy(output.float(), targets, label_smoothing=self.s.label_smoothing) / len(pieces)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            logits.append(output.detach())
        return total, torch.cat(logits)

    def _step(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update. Returns the loss and the logits of the first pass."""
        self.optimizer.zero_grad()
        if self.s.method == "popt":
            with self.optimizer.perturb():
                found = self._gradient(module, x, y)
        else:
            found = self._gradient(module, x, y)
            if getattr(self.optimizer, "active", False):
                with self.optimizer.perturb():
                    self._gradient(module, x, y)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return found

    def train_epoch(self, title: str) -> None:
        """One pass over the training images, then a test; adds a row to the history."""
        epoch, start, lr = len(self.history), time.perf_counter(), 0.0
        module = self._prepare(epoch)
        torch.manual_seed(seed_of(self.s.seed, "dropout", epoch, self.place.rank))
        if self.noise is not None:
            self.noise.set_epoch(epoch)
        view = View(
            self.data.train,
            self.s.size,
            seed_of(self.s.seed, "crop", epoch),
            self.s.smallest_crop,
            self.s.flip,
        )
        # loss, labels fitted, wrong labels, wrong labels fitted: on the device, where reading them would wait
        sums = torch.zeros(4, dtype=torch.float64, device=self.place.device)
        batches = loader(view, self._batches(epoch), self.place.workers)
        with tqdm(batches, desc=title, unit="batch", leave=False, **self.place.bar) as bar:
            for images, _, rows in bar:
                x = (images.to(self.place.device) / 255 - self.mean) / self.std
                y = self._targets(rows).to(self.place.device)
                lr = max(lr, self.optimizer.param_groups[0]["lr"])
                try:
                    loss, logits = self._step(module, x.contiguous(memory_format=torch.channels_last), y)
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise UsageError(
                        f"--batchnorm trained: one image of {self.s.size} pixels has no statistics; give two or more "
                        "in each piece of a batch (--batch-size, --accumulate, processes), or --batchnorm frozen"
                    ) from error
                hard = self.labels[rows].to(self.place.device)
                fitted, wrong = logits.argmax(1) == hard, self.wrong[rows].to(self.place.device)
                sums += torch.stack([loss * len(rows), fitted.sum(), wrong.sum(), (fitted & wrong).sum()])
        if not math.isfinite(float(sums[0])):
            raise UsageError(
                f"{title}: the loss is {float(sums[0])}; give a smaller --lr, or --amp bf16 instead of fp16"
            )
        if self.place.world > 1:
            torch.distributed.all_reduce(sums)
        lost, fitted, wrong, memorised = sums.tolist()
        seen, seconds = self.steps * self.size, time.perf_counter() - start
        loss, accuracy = self.score(self.predict())
        self.history.append(
            {
                "lr": lr,
                "train_loss": lost / seen,
                "train_accuracy": 100.0 * fitted / seen,
                "wrong_fitted": 100.0 * memorised / wrong if wrong else math.nan,
                "test_loss": loss,
                "test_accuracy": accuracy,
                "seconds": seconds,
            }
        )

    # ---- measuring ----

    @property
    def result(self) -> nn.Module:
        """The network to keep: the averaged one, if weights are averaged."""
        return self.model if self.average is None else self.average.module

    def predict(self) -> Tensor:
        """Logits [N, C] of the test images."""
        return outputs(self.result, self.data.test, self.s.size, 2 * self.size, self.place, title="test")

    def score(self, logits: Tensor) -> tuple[float, float]:
        """Loss in nats, and accuracy in percent, on the clean test labels."""
        truth = self.data.test.labels
        return float(F.cross_entropy(logits, truth)), 100.0 * float((logits.argmax(1) == truth).double().mean())

    def sharpness(self) -> dict[str, float]:
        """How flat the loss is around the trained weights, on training images as they are, with the given labels."""
        model, count = self.result.eval(), min(self.s.sharpness_images, len(self.labels))
        # Equal shares of the classes; the same images for every method.
        part = self.data.train.first(count)
        at = torch.isin(self.data.train.rows, part.rows).nonzero().flatten()
        view, size = View(self.data.train, self.s.size), 32
        batches = []
        for images, _, rows in loader(view, at.split(size), 0):
            x = (images.to(self.place.device) / 255 - self.mean) / self.std
            batches.append((x, self.labels[rows].to(self.place.device)))
        model.requires_grad_(True)
        common: dict[str, Any] = {"progress": False if not self.place.speaks else None}
        loss = F.cross_entropy
        rise = sharpness.m_sharpness(model, loss, batches, self.s.sharpness_rho, 16, seed=0, **common)
        noisy = sharpness.expected_sharpness(
            model, loss, batches, scale=0.05, gamma=1.0, eps=0.0, samples=3, antithetic=True, seed=0, **common
        )
        with warnings.catch_warnings():  # of an eigenvalue that has not converged: its residual is in the result
            warnings.simplefilter("ignore", RuntimeWarning)
            top = curvature.eigenvalues(
                model, loss, batches, k=1, max_products=self.s.sharpness_products, seed=0, **common
            )
        return {
            "images": count,
            "rho": self.s.sharpness_rho,
            "m_sharpness_16": rise.value,
            "m_sharpness_16_error": rise.stderr,
            "expected_relative_0.05": noisy.value,
            "expected_relative_0.05_error": noisy.stderr,
            "lambda_1": float(top.values[0]),
            "lambda_1_residual": float(top.residuals[0]),
        }


def confusion(logits: Tensor, truth: Tensor) -> list[list[int]]:
    """Row y, column k: how many test images of class y were taken for k."""
    classes = logits.shape[1]
    counts = torch.bincount(truth * classes + logits.argmax(1), minlength=classes * classes)
    return counts.view(classes, classes).tolist()


HEAD = " epoch       lr   train loss   labels fitted   wrong ones fitted   test loss   test accuracy   seconds"


def row(number: int, entry: dict[str, float]) -> str:
    """A line of the table of epochs."""
    wrong = "-" if math.isnan(entry["wrong_fitted"]) else f"{entry['wrong_fitted']:.1f} %"
    return (
        f"{number:6d} {entry['lr']:8.2g} {entry['train_loss']:12.4f} {entry['train_accuracy']:13.1f} % {wrong:>19}"
        f" {entry['test_loss']:11.4f} {entry['test_accuracy']:13.1f} % {entry['seconds']:9.0f}"
    )


def epochs(learner: Learner, title: str) -> Iterator[int]:
    """Train epoch by epoch, with the table; yields the number of epochs behind."""
    speaks = learner.place.speaks
    if speaks:
        print(f"\n{title}\n{HEAD}", flush=True)
        for number, entry in enumerate(learner.history, 1):
            print(row(number, entry), flush=True)
    while len(learner.history) < learner.s.epochs:
        number = len(learner.history) + 1
        learner.train_epoch(f"{title}, epoch {number}/{learner.s.epochs}")
        if speaks:
            tqdm.write(row(number, learner.history[-1]))
        yield number


def fit(run: Run, log: Log, data: Data, place: Place, title: str) -> dict[str, Any]:
    """A whole run, from where its log stopped: what belongs in the JSON. Rank 0 keeps the log and the weights."""
    learner = Learner(run, data, place)
    state = log.resume()
    if state["epoch"]:
        learner.load(state)
    for _ in epochs(learner, title):
        if place.speaks:
            log.save(learner.state())
    logits = learner.predict()
    result: dict[str, Any] = {"history": learner.history, "wrong_labels": int(learner.wrong.sum())}
    result["confusion"] = confusion(logits, data.test.labels)
    if place.speaks:
        measured = min(learner.s.sharpness_images, len(learner.labels)) >= 32  # two groups of 16
        result["sharpness"] = learner.sharpness() if measured else None
        weights = {k: v.cpu() for k, v in learner.result.state_dict().items()}
        with in_one_step(log.result_path.with_suffix(".weights.pt")) as partial:
            torch.save(weights, partial)
    return result


def accuracies(result: dict[str, Any]) -> Sequence[float]:
    """Test accuracy after every epoch."""
    return [entry["test_accuracy"] for entry in result["history"]]
