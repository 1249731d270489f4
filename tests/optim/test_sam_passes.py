"""What the second pass must not count or draw anew: BatchNorm statistics and random numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flatmin import SAM
from models import (
    backward,
    batches,
    loss_of,
    same_bits,
    step_closure,
    step_context,
    step_davda54,
    step_halves,
    train,
)

WAYS = [step_context, step_closure, step_davda54, step_halves]


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1)


# ---- BatchNorm ----


def norm_net(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def buffers(net: nn.Module) -> list[Tensor]:
    return [b.clone() for b in net.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_statistics_count_the_clean_pass_only(way: Callable[..., None], momentum: float | None) -> None:
    net, follower = norm_net(momentum), norm_net(momentum)
    opt = SAM(sgd(net), rho=0.5, model=net)
    for batch in batches(4):
        follower.load_state_dict({k: v for k, v in net.state_dict().items() if "running" not in k}, strict=False)
        follower(batch[0])
        way(net, opt, batch)
        assert same_bits(net.buffers(), follower.buffers())
    assert int(net[2].num_batches_tracked) == 4


def test_without_model_both_passes_count() -> None:
    net = norm_net()
    train(net, SAM(sgd(net), rho=0.5), batches(4))
    assert int(net[2].num_batches_tracked) == 8


def test_frozen_and_untracked_modules_are_left_alone() -> None:
    net = nn.Sequential(norm_net(), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3, affine=False))
    net[0][2].eval()
    before = buffers(net[0])
    opt = SAM(sgd(net), rho=0.5, model=net)
    train(net, opt, batches(3))
    assert same_bits(net[0].buffers(), before)
    assert int(net[2].num_batches_tracked) == 3


def test_statistics_come_back_after_an_exception() -> None:
    net, batch = norm_net(), batches(1)[0]
    opt = SAM(sgd(net), rho=0.5, model=net)
    backward(net, batch)
    clean = buffers(net)
    with pytest.raises(KeyboardInterrupt), opt.perturb():
        net(batch[0])
        assert not same_bits(net.buffers(), clean)
        raise KeyboardInterrupt
    assert same_bits(net.buffers(), clean)


def test_statistics_count_every_micro_batch_of_backward_once() -> None:
    net, data = norm_net(), batches(3)
    opt = SAM(sgd(net), rho=0.5, model=net)
    opt.backward(lambda i: loss_of(net, data[i]), m=3)
    assert int(net[2].num_batches_tracked) == 3


# ---- random numbers ----


class DropoutNet(nn.Module):
    """Remembers the mask that each training forward drew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(36, 3)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(36), 0.5, self.training)
        self.masks.append(mask)
        return self.linear(x.flatten(1) * mask)


def replayed(net: nn.Module) -> SAM:
    return SAM(sgd(net), rho=0.1, model=net, same_rng=True)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_both_passes_drop_the_same_units(way: Callable[..., None]) -> None:
    net = DropoutNet()
    opt = replayed(net)
    train(net, opt, batches(3), way)
    first, second = net.masks[::2], net.masks[1::2]
    assert same_bits(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_the_generator_goes_on_as_after_the_first_pass() -> None:
    net, bare = DropoutNet(), DropoutNet()
    opt = replayed(net)
    torch.manual_seed(5)
    train(net, opt, batches(3))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for batch in batches(3):
        bare(batch[0])
    assert torch.equal(torch.get_rng_state(), after)
    assert same_bits(net.masks[::2], bare.masks)


def test_without_same_rng_the_masks_differ() -> None:
    net = DropoutNet()
    train(net, SAM(sgd(net), rho=0.1, model=net), batches(2))
    assert not torch.equal(net.masks[0], net.masks[1])


def test_accumulated_forwards_are_replayed_in_their_order() -> None:
    net, data = DropoutNet(), batches(3)
    opt = replayed(net)
    for batch in data:
        backward(net, batch)
    with opt.perturb():
        for batch in data:
            backward(net, batch)
    opt.step()
    assert same_bits(net.masks[:3], net.masks[3:])
    net.masks.clear()
    opt.backward(lambda i: loss_of(net, data[i]), m=3)
    assert same_bits(net.masks[::2], net.masks[1::2])
    assert not torch.equal(net.masks[0], net.masks[2])


def test_evaluation_between_the_passes_is_not_replayed() -> None:
    net, batch = DropoutNet(), batches(1)[0]
    opt = replayed(net)
    with torch.no_grad():
        net(batch[0])
    net.eval()
    net(batch[0])
    net.train()
    backward(net, batch)
    with opt.perturb():
        with torch.no_grad():
            net(batch[0])
        backward(net, batch)
    assert torch.equal(net.masks[2], net.masks[4])
    assert not torch.equal(net.masks[2], net.masks[3])


def test_a_forward_that_fails_leaves_the_generator() -> None:
    net, batch = DropoutNet(), batches(1)[0]
    opt = replayed(net)
    backward(net, batch)
    torch.rand(3)  # other than what the replayed forward leaves
    before = torch.get_rng_state()
    with opt.perturb(), pytest.raises(RuntimeError, match="size of tensor"):
        net(torch.ones(1, 5))
    assert torch.equal(torch.get_rng_state(), before)
    opt.zero_grad()
    train(net, opt, [batch])
    assert torch.equal(net.masks[-1], net.masks[-2])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_pair_replays_by_itself(how: str) -> None:
    net = DropoutNet()
    opt = replayed(net)
    train(net, opt, batches(1))
    other, other_opt = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    net.masks.clear()
    other.masks.clear()
    train(other, other_opt, batches(2))
    assert same_bits(other.masks[::2], other.masks[1::2])
    assert not net.masks
    assert other_opt._replay.model is other


def test_a_copied_model_is_free_of_the_optimizer() -> None:
    net = DropoutNet()
    opt = replayed(net)
    lone = copy.deepcopy(net)
    backward(net, batches(1)[0])
    opt.ascend()
    backward(lone, batches(1)[0])
    backward(lone, batches(1)[0])
    assert not torch.equal(lone.masks[0], lone.masks[1])
    opt.restore()


def test_the_models_hooks_keep_no_optimizer_alive() -> None:
    net = DropoutNet()
    opt = replayed(net)
    gone = [weakref.ref(opt), weakref.ref(opt._replay)]
    del opt
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    backward(net, batches(1)[0])
    assert len(net.masks) == 1


def test_recorded_states_do_not_pile_up() -> None:
    net = DropoutNet()
    opt = replayed(net)
    opt.param_groups[0]["sam_rho"] = 0.0
    train(net, opt, batches(3))
    assert opt._replay._recorded == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_models_masks_are_replayed(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))
    model = torch.compile(net, backend=backend)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=1e-6, model=model, same_rng=True)
    batch = batches(1)[0]
    first = backward(model, batch)
    with opt.perturb():
        second = backward(model, batch)
    # another mask would change the loss by its own size; a radius of 1e-6 does not
    assert second.item() == pytest.approx(first.item(), rel=1e-4)
