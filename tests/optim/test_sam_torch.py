"""SAM as torch and its trainers see it: state, copies, schedulers, hooks, checkpoints, compiled models."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint import state_dict as dcp
from torch.profiler import ProfilerActivity, profile

from flatmin import SAM
from models import (
    backward,
    batches,
    closure_of,
    distance,
    loss_of,
    same_bits,
    small_net,
    step_closure,
    step_context,
    step_davda54,
    step_halves,
    train,
    train_bare,
    weights,
)

WAYS = [step_context, step_closure, step_davda54, step_halves]


def momentum_sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)


def sam_net(**options: Any) -> tuple[nn.Module, SAM]:
    net = small_net()
    return net, SAM(momentum_sgd(net), rho=0.1, **options)


# ---- what the base owns ----


def test_the_wrapper_holds_the_objects_of_the_base() -> None:
    net, opt = sam_net()
    base = opt.base
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.base_optimizer is base
    train(net, opt, batches(1))
    for name in ("param_groups", "state", "defaults"):
        assert getattr(opt, name) is getattr(base, name)
    opt.load_state_dict(opt.state_dict())  # replaces the first two on the base
    for name in ("param_groups", "state", "defaults"):
        assert getattr(opt, name) is getattr(base, name)
    opt.state = {}
    assert base.state == {}
    assert set(opt.state_dict()) == {"state", "param_groups"}


def test_the_class_form_builds_the_base() -> None:
    net = small_net()
    opt = SAM(net.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.5)
    named = SAM(small_net().parameters(), base_optimizer=torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.5)
    assert type(opt.base) is type(named.base) is torch.optim.SGD
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["sam_rho"]) == (0.1, 0.5, 0.2)
    assert "SAM(SGD (" in repr(opt)
    assert "sam_rho: 0.2" in repr(opt)


def test_checkpoints_pass_between_sam_and_the_bare_optimizer() -> None:
    data = batches(6)
    net, opt = sam_net()
    train(net, opt, data[:3])
    bare_net = small_net()
    bare = momentum_sgd(bare_net)
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch does not copy tensors that it loads
    bare_net.load_state_dict(net.state_dict())
    assert same_bits([opt.state[p]["momentum_buffer"] for p in net.parameters()],
                     [bare.state[p]["momentum_buffer"] for p in bare_net.parameters()])  # fmt: skip
    wrapped = SAM(bare, rho=0.5)  # the checkpoint's radius counts, as it does in load_state_dict
    assert wrapped.param_groups[0]["sam_rho"] == 0.1
    assert wrapped.param_groups[0]["sam_step"] == 3
    train(net, opt, data[3:])
    train(bare_net, wrapped, data[3:])
    assert same_bits(net.parameters(), bare_net.parameters())


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_checkpoint_without_our_keys_keeps_the_constructors_values(through: str) -> None:
    bare_net = small_net()
    bare = momentum_sgd(bare_net)
    train_bare(bare_net, bare, batches(2))
    net, opt = sam_net(interval=2)
    (opt if through == "wrapper" else opt.base).load_state_dict(bare.state_dict())
    train(net, opt, batches(2))
    assert opt.param_groups[0]["sam_rho"] == 0.1
    assert opt.param_groups[0]["sam_step"] == 2


def test_state_dict_is_refused_while_perturbed() -> None:
    net, opt = sam_net()
    state = opt.state_dict()
    backward(net, batches(1)[0])
    with opt.perturb():
        with pytest.raises(RuntimeError, match=r"state_dict\(\): the weights are perturbed"):
            opt.state_dict()
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\): the weights are perturbed"):
            opt.load_state_dict(state)
    assert opt.state_dict()["param_groups"] == state["param_groups"]


def test_add_param_group_goes_to_the_base() -> None:
    net, opt = sam_net()
    data = batches(3)
    train(net, opt, data)
    extra = nn.Parameter(torch.zeros(3))
    opt.add_param_group({"params": [extra], "lr": 0.5, "sam_rho": 0.0})
    added = opt.base.param_groups[1]
    assert (added["momentum"], added["sam_rho"], added["sam_step"]) == (0.9, 0.0, 3)
    for batch in data:
        opt.zero_grad()
        (loss_of(net, batch) + extra.sum()).backward()
        with opt.perturb():
            assert not extra.any() or opt.param_groups[1]["sam_step"] > 3
            (loss_of(net, batch) + extra.sum()).backward()
        opt.step()
    assert extra[0].item() == pytest.approx(-0.5 * (1 + 1.9 + 2.71))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [extra]})


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_as_the_original(how: str, perturbed: bool) -> None:
    net, opt = sam_net()
    data = batches(6)
    torch.optim.lr_scheduler.StepLR(opt, 1)  # patches step onto the instance: not picklable
    train(net, opt, data[:3])
    if perturbed:
        opt.zero_grad()
        backward(net, data[3])
        opt.ascend()
    pair = (net, opt)
    other_net, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert "step" not in vars(other)
    assert other.param_groups is other.base.param_groups
    if perturbed:
        assert same_bits(net.parameters(), other_net.parameters())
        opt.restore()
        other.restore()
    assert same_bits(net.parameters(), other_net.parameters())
    original = weights(net)
    train(other_net, other, data[3:])
    assert same_bits(net.parameters(), original)
    train(net, opt, data[3:])
    assert same_bits(net.parameters(), other_net.parameters())


# ---- schedulers, hooks ----


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", ["wrapper", "base"])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_schedulers_take_either_and_warn_of_nothing(way: Callable[..., None], target: str) -> None:
    net, opt = sam_net()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt if target == "wrapper" else opt.base, 0.5)
    for n, batch in enumerate(batches(3)):
        way(net, opt, batch)
        scheduler.step()
        assert opt.param_groups[0]["lr"] == opt.base.param_groups[0]["lr"] == 0.1 * 0.5 ** (n + 1)
    plain, bare = small_net(), None
    bare = SAM(momentum_sgd(plain), rho=0.1)
    for n, batch in enumerate(batches(3)):
        bare.param_groups[0]["lr"] = 0.1 * 0.5**n
        way(plain, bare, batch)
    assert same_bits(net.parameters(), plain.parameters())


@pytest.mark.filterwarnings("error")
def test_a_scheduler_may_drive_the_radius() -> None:
    net, opt = sam_net()
    seen = []
    for n, batch in enumerate(batches(3)):
        opt.param_groups[0]["sam_rho"] = 0.1 * n
        backward(net, batch)
        before = weights(net)
        with opt.perturb():
            moved = [w - v for w, v in zip(weights(net), before, strict=True)]
        seen.append(float(torch.linalg.vector_norm(torch.cat([e.flatten() for e in moved]))))
        opt.zero_grad()
    assert seen == pytest.approx([0.0, 0.1, 0.2], rel=1e-5)


def test_the_profiler_sees_the_step() -> None:
    """Under the name that torch gives to every optimizer's."""
    _, opt = sam_net()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        opt.step()
    assert "Optimizer.step#SAM.step" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_step_hooks_fire_on_both_base_first(way: Callable[..., None]) -> None:
    net, opt = sam_net()
    log: list[str] = []
    opt.register_step_pre_hook(lambda *_: log.append("pre wrapper"))
    opt.base.register_step_pre_hook(lambda *_: log.append("pre base"))
    opt.base.register_step_post_hook(lambda *_: log.append("post base"))
    opt.register_step_post_hook(lambda *_: log.append("post wrapper"))
    way(net, opt, batches(1)[0])
    assert log == ["pre wrapper", "pre base", "post base", "post wrapper"]


def test_checkpoint_hooks_fire_on_both() -> None:
    _, opt = sam_net()
    log: list[str] = []
    for name, target in (("wrapper", opt), ("base", opt.base)):
        target.register_state_dict_pre_hook(lambda _, n=name: log.append(f"save {n}"))
        target.register_state_dict_post_hook(lambda _, state, n=name: state | {n: True})
        target.register_load_state_dict_pre_hook(lambda _, state, n=name: log.append(f"load {n}"))
        target.register_load_state_dict_post_hook(lambda _, n=name: log.append(f"loaded {n}"))
    state = opt.state_dict()
    assert state["wrapper"] and state["base"]
    opt.load_state_dict(state)
    assert log == ["save wrapper", "save base", "load wrapper", "load base", "loaded base", "loaded wrapper"]


# ---- trainers ----


def test_accelerates_call_pattern() -> None:
    """Accelerate loads the optimizer's own state in its constructor and steps through the scaler."""
    net, opt = sam_net()
    opt.load_state_dict(opt.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for batch in batches(3):
        scaler.scale(loss_of(net, batch)).backward()
        with opt.perturb():
            scaler.scale(loss_of(net, batch)).backward()
        scaler.step(opt, None)
        scaler.update()
        opt.zero_grad()
    plain, bare = sam_net()
    train(plain, bare, batches(3))
    assert same_bits(net.parameters(), plain.parameters())


class TrainerOptimizer:
    """As Lightning wraps: an instance that turns into a subclass of the optimizer's class and forwards the rest."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__class__ = type("Trainer" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_dynamic_subclass_that_forwards(way: Callable[..., None]) -> None:
    net, opt = sam_net()
    outer = TrainerOptimizer(opt)
    assert isinstance(outer, SAM)
    assert outer.param_groups is opt.param_groups
    train(net, outer, batches(3), way)
    backward(net, batches(1)[0])
    outer.ascend()
    with pytest.raises(RuntimeError, match="the weights are perturbed"):
        opt.state_dict()
    opt.restore()
    plain, bare = sam_net()
    train(plain, bare, batches(3), way)
    assert same_bits(net.parameters(), plain.parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_distributed_checkpoint_gets_and_sets_the_state(cls: type[torch.optim.Optimizer]) -> None:
    def new() -> tuple[nn.Module, SAM]:
        net = small_net()
        return net, SAM(cls(net.parameters(), lr=0.01), rho=0.1, interval=2)

    data = batches(6)
    net, opt = new()
    train(net, opt, data[:3])
    opt.zero_grad()
    state = dcp.get_optimizer_state_dict(net, opt)
    assert dcp.get_optimizer_state_dict(net, opt)["param_groups"][0]["sam_step"] == 3  # saving counts no step
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other_net, other = new()
    other_net.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(other_net, other, torch.load(buffer, weights_only=True))
    assert other.param_groups[0]["sam_step"] == 3
    train(net, opt, data[3:])
    train(other_net, other, data[3:])
    assert same_bits(net.parameters(), other_net.parameters())


def test_no_gradient_at_all_is_a_legal_step() -> None:
    net, opt = sam_net()
    before = weights(net)
    assert opt.step() is None
    assert opt.step(closure=None) is None
    assert same_bits(net.parameters(), before)


def test_a_step_that_was_patched_on_the_instance_is_called() -> None:
    """davda54-style loops call second_step; a scheduler's wrapper of step must still see it."""
    net, opt = sam_net()
    calls = []
    inner = opt.step
    opt.step = lambda closure=None: calls.append(closure) or inner(closure)
    step_davda54(net, opt, batches(1)[0])
    assert calls == [None]


# ---- compiled models, inference ----


def test_a_compiled_model_sees_the_moved_weights() -> None:
    net, plain = small_net(), small_net()
    opt, bare = SAM(momentum_sgd(net), rho=0.5), SAM(momentum_sgd(plain), rho=0.5)
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=frames)
    for batch in batches(3):
        step_context(compiled, opt, batch)
        step_context(plain, bare, batch)
    assert frames.frame_count == 1
    assert distance(weights(net), weights(plain)) < 1e-6


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_recurrent_weights_keep_their_one_block(way: Callable[..., None]) -> None:
    """RNNs flatten their weights into one block and warn, or go wrong on a GPU, once storage is swapped."""
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    opt = SAM(momentum_sgd(rnn), rho=0.1)
    addresses = [p.data_ptr() for p in rnn.parameters()]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, inputs: Tensor) -> Tensor:
            return self.rnn(inputs)[0][-1, :, :3]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way(Net(), opt, (x, torch.tensor([0, 2])))
    assert [p.data_ptr() for p in rnn.parameters()] == addresses


def test_a_closure_that_was_given_by_position_or_by_name() -> None:
    net, opt = sam_net()
    batch = batches(1)[0]
    a = opt.step(closure_of(net, opt, batch))
    b = opt.step(closure=closure_of(net, opt, batch))
    assert b.item() < a.item()
