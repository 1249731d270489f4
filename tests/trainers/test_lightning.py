"""Lightning: recipes, and what it did to wrappers once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flatmin import SAM, PerturbedOPT
from models import distance, weights
from plain_sam import difference, losses_of, moved, plain_sam, value

pytestmark = [pytest.mark.requires("lightning"), pytest.mark.filterwarnings("ignore:::lightning")]

Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_automatic_optimization_is_sam_and_logs_the_clean_loss(recipe: Load, precision: str) -> None:
    lightning, toy = recipe("lightning_automatic"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start, logged = copy.deepcopy(net), []

    class Logged(lightning.SharpnessAware):
        def on_train_batch_end(self, *args: object) -> None:
            logged.append(float(self.trainer.callback_metrics["train_loss"]))

    module = Logged(net)
    fit = lightning.trainer(precision=precision)
    fit.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    cast = torch.bfloat16 if precision == "bf16-mixed" else None
    steps = losses_of(data, autocast=cast)
    expected = plain_sam(start, steps, dtype=torch.float32 if cast else torch.float64)
    assert moved(net, start) > 0.1
    assert difference(net, expected) < (1e-6 if cast is None else 1e-5)
    assert logged[0] == pytest.approx(value(steps[0][0], start), rel=1e-6)
    assert len(logged) == 20


def test_a_log_in_the_training_step_has_the_mean_of_both_passes(recipe: Load) -> None:
    """As docs/trainers.md says: Lightning averages whatever is logged within one step."""
    lightning, toy = recipe("lightning_automatic"), recipe("_toy")
    (batch,) = toy.batches(1)
    net = toy.net()
    seen = []

    class Logs(lightning.SharpnessAware):
        def training_step(self, batch: object, index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            seen.append(float(loss.detach()))
            self.log("both", loss, on_epoch=True, batch_size=16)
            return loss

    fit = lightning.trainer()
    fit.fit(Logs(net), torch.utils.data.DataLoader([batch], batch_size=None))
    assert len(seen) == 2 and seen[1] > seen[0]
    assert float(fit.callback_metrics["both_epoch"]) == pytest.approx(sum(seen) / 2)


def test_accumulation_in_automatic_optimization_is_refused(recipe: Load) -> None:
    lightning, toy = recipe("lightning_automatic"), recipe("_toy")
    with pytest.raises(RuntimeError, match=r"to accumulate micro-batches, call opt.backward\(closure\)"):
        lightning.train(toy.net(), toy.batches(4), accumulate_grad_batches=2)


def test_accumulation_by_hand_is_the_mean_of_sam_gradients(recipe: Load) -> None:
    lightning, toy = recipe("lightning_accumulation"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    lightning.train(net, data, accumulate=2)
    assert difference(net, plain_sam(start, losses_of(data, 2), per_loss=True)) < 1e-6


def test_manual_optimization_trains(recipe: Load) -> None:
    """Its ``step`` passes a closure that clips and computes nothing; once that cleared the gradients, in silence."""
    lightning, toy = recipe("lightning_manual"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    lightning.train(net, data)
    assert moved(net, start) > 0.1
    assert difference(net, plain_sam(start, losses_of(data), clip=1.0)) < 1e-6


def scaled_half() -> object:
    """Precision "16-mixed" on a CPU, where Lightning would take bf16 by itself."""
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_manual_optimization_in_half_precision(recipe: Load) -> None:
    lightning, toy = recipe("lightning_manual"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    lightning.train(net, data, plugins=[scaled_half()])
    expected = plain_sam(start, losses_of(data, autocast=torch.float16), clip=1.0, dtype=torch.float32)
    assert moved(net, start) > 0.1
    # gradients that float16 rounds to nothing without a scale are there with one
    assert difference(net, expected) < 2e-3


def test_automatic_optimization_in_half_precision_says_that_it_is_plain_training(recipe: Load) -> None:
    automatic, toy = recipe("lightning_automatic"), recipe("_toy")

    class Unlogged(automatic.SharpnessAware):
        optimizer_step = automatic.lightning.LightningModule.optimizer_step

    data = torch.utils.data.DataLoader(toy.batches(4), batch_size=None)
    with pytest.warns(UserWarning, match=r"ran twice without a perturbation"):
        automatic.trainer(plugins=[scaled_half()]).fit(Unlogged(toy.net()), data)


def test_several_draws_of_noise_in_manual_optimization(recipe: Load) -> None:
    """The empty closure once divided the gradient by the number of draws."""
    lightning, toy = recipe("lightning_manual"), recipe("_toy")
    data = toy.batches(10)

    def optimizer(net: torch.nn.Module) -> PerturbedOPT:
        generator = torch.Generator().manual_seed(3)
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        return PerturbedOPT(base, sizing="isotropic", scale=0.05, samples=2, generator=generator)

    class Noisy(lightning.SharpnessAware):
        def training_step(self, batch: object, index: int) -> None:
            opt = self.optimizers()
            opt.zero_grad()
            for _ in range(2):
                with opt.perturb():
                    self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 2)
            opt.step()

        def configure_optimizers(self) -> PerturbedOPT:
            return optimizer(self.net)

    net, twin = toy.net(), toy.net()
    fit = recipe("lightning_automatic").trainer()
    fit.fit(Noisy(net, clip=1e9), torch.utils.data.DataLoader(data, batch_size=None))
    opt = optimizer(twin)
    for x, y in data:
        opt.zero_grad()
        for _ in range(2):
            with opt.perturb():
                (F.cross_entropy(twin(x), y) / 2).backward()
        opt.step()
    assert distance(weights(net), weights(twin)) < 1e-6
    assert moved(net, toy.net()) > 0.01


def test_a_wrapped_optimizer_goes_into_lightnings_checkpoint(recipe: Load, tmp_path: object) -> None:
    lightning, toy = recipe("lightning_automatic"), recipe("_toy")
    fit = lightning.trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit.fit(lightning.SharpnessAware(toy.net()), torch.utils.data.DataLoader(toy.batches(3), batch_size=None))
        fit.save_checkpoint(f"{tmp_path}/run.ckpt")
        (state,) = torch.load(f"{tmp_path}/run.ckpt", weights_only=False)["optimizer_states"]
    bare = torch.optim.SGD(toy.net().parameters(), lr=0.1, momentum=0.9)
    bare.load_state_dict(state)
    assert len(bare.state) == 4
    assert isinstance(fit.optimizers[0], SAM)
