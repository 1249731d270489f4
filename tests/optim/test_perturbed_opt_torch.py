"""PerturbedOPT as torch and its trainers see it: checkpoints, copies, schedulers, hooks, GradScaler, BatchNorm."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from flatmin import PerturbedOPT
from models import (
    backward,
    batches,
    build,
    distance,
    give_grads,
    loss_of,
    params_of,
    same_bits,
    sgd,
    small_net,
    train_bare,
    weights,
)
from popt_reference import MIXED, WAYS, curvatures, in_context, momentum_sgd, noisy_net, run

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- checkpoints ----


def squares(params: list[Tensor]) -> list[Tensor]:
    return [p.detach() ** 2 for p in params]


RUNS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.Adam, {}),
    (torch.optim.SGD, {"lipschitz": "element", "distribution": "truncated_normal", "schedule": "log", "samples": 2}),
    (torch.optim.Adam, {"lipschitz": 2.0, "distribution": "normal", "start": 2}),
    (torch.optim.SGD, {"curvature": squares, "curvature_interval": 2}),
    (torch.optim.Adam, {"curvature": "hutchinson", "curvature_interval": 2, "lipschitz": "element"}),
    (torch.optim.SGD, {"curvature": "gnb", "curvature_interval": 3}),
]


def new_run(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[nn.Module, PerturbedOPT]:
    net = small_net()
    base = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    generator = torch.Generator().manual_seed(7)
    return net, PerturbedOPT(build(cls, net.parameters(), **base), generator=generator, **(MIXED | options))


def go_on(net: nn.Module, opt: PerturbedOPT, data: list[Any], way: Any, options: dict[str, Any]) -> None:
    """Train, with epochs of two batches."""
    for n, batch in enumerate(data):
        if options.get("curvature") == "gnb":
            opt.update_curvature(lambda batch=batch: net(batch[0]))
        if options.get("curvature") == "hutchinson":
            opt.update_curvature(lambda batch=batch: loss_of(net, batch))
        way(net, opt, batch)
        if n % 2:
            opt.next_epoch()


@pytest.mark.parametrize(("cls", "options"), RUNS, ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(x))
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_resumed_run_is_the_same_to_the_last_bit(cls, options, way) -> None:
    data = batches(8)
    net, opt = new_run(cls, options)
    go_on(net, opt, data, way, options)
    first, first_opt = new_run(cls, options)
    go_on(first, first_opt, data[:4], way, options)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "opt": first_opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_opt = new_run(cls, options)
    second.load_state_dict(saved["net"])
    second_opt.load_state_dict(saved["opt"])
    go_on(second, second_opt, data[4:], way, options)
    assert same_bits(second.parameters(), net.parameters())
    assert same_bits(curvatures(second_opt), curvatures(opt))


MISSING = [
    ([(), (0,), (1, 2), (), (0,), (), (3,), ()], [6, 7, 7, 7, 8, 8]),
    ([(), (0,), (1, 2, 3, 4, 5), (), (), ()], [5, 5, 5, 5, 5, 5]),  # parted by the second step, as old by the third
]


@pytest.mark.parametrize(("missing", "updates"), MISSING)
def test_resuming_between_steps_that_reach_different_parameters(missing: list[Any], updates: list[int]) -> None:
    """Buckets part and join as parameters miss gradients: the noise must not depend on how they came about."""

    def train(net: nn.Module, opt: PerturbedOPT, first: int, last: int) -> None:
        params, data = list(net.parameters()), batches(len(missing))
        for n in range(first, last):
            opt.zero_grad()
            with opt.perturb():
                backward(net, data[n])
            for i in missing[n]:
                params[i].grad = None
            opt.step()

    net, opt = noisy_net(lipschitz="element")
    train(net, opt, 0, len(missing))
    for stop in (2, 3, 5):
        first, first_opt = noisy_net(lipschitz="element")
        train(first, first_opt, 0, stop)
        second, second_opt = noisy_net(lipschitz="element", generator=None)
        second.load_state_dict(first.state_dict())
        second_opt.load_state_dict(copy.deepcopy(first_opt.state_dict()))
        train(second, second_opt, stop, len(missing))
        assert same_bits(second.parameters(), net.parameters())
    assert [entry["updates"] for entry in opt.state_dict()["noise"]["state"].values()] == updates


def test_checkpoints_pass_between_perturbed_and_bare_optimizer() -> None:
    data = batches(6)
    net, opt = noisy_net()
    run(net, opt, data[:3])
    state = opt.state_dict()
    assert set(state) == {"base", "noise"} == set(copy.deepcopy(state))
    bare = momentum_sgd(bare_net := small_net())
    bare.load_state_dict(copy.deepcopy(state["base"]))
    assert same_bits(
        [opt.state[p]["momentum_buffer"] for p in net.parameters()],
        [bare.state[p]["momentum_buffer"] for p in bare_net.parameters()],
    )
    bare_net.load_state_dict(net.state_dict())
    train_bare(bare_net, bare, data[3:])
    other_net, other = noisy_net()
    run(other_net, other, data[:2])
    other_net.load_state_dict(bare_net.state_dict())
    other.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert not other.active  # the noise begins anew
    assert other.state_dict()["noise"]["state"] == {}
    run(other_net, other, data[:1])
    train_bare(bare_net, bare, data[:1])
    assert same_bits(other_net.parameters(), bare_net.parameters())
    assert other.active


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_checkpoint_without_our_keys_keeps_the_constructors_values(through: str) -> None:
    bare = momentum_sgd(bare_net := small_net())
    train_bare(bare_net, bare, batches(1))
    net, opt = noisy_net()
    (opt if through == "wrapper" else opt.base).load_state_dict(bare.state_dict())
    run(net, opt, batches(2))
    assert opt.param_groups[0]["popt_gamma"] == MIXED["gamma"]


def test_what_is_no_checkpoint_of_this_model_changes_nothing() -> None:
    net, opt = noisy_net()
    run(net, opt, batches(2))
    before = copy.deepcopy(opt.state_dict())
    (weight,) = params_of([1.0])
    other = PerturbedOPT(sgd([weight]))
    give_grads([weight], [1.0])
    other.step()
    wrong = other.state_dict()["noise"]["state"]
    for state, message in (
        ({"model": {}}, "state_dict: it has .'model'.; neither a checkpoint of PerturbedOPT"),
        ({"base": before["base"], "noise": before["noise"] | {"state": wrong}}, "curvature of parameter 0 has shape"),
        ({"base": other.state_dict()["base"], "noise": before["noise"]}, "parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
    after = opt.state_dict()
    assert same_bits(*([e["curvature"] for e in s["noise"]["state"].values()] for s in (before, after)))


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam], ids=lambda c: c.__name__)
@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoint_gets_and_sets_the_state(cls: type[torch.optim.Optimizer], full: bool) -> None:
    def new() -> tuple[nn.Module, PerturbedOPT]:
        net = small_net()
        generator = torch.Generator().manual_seed(7)
        return net, PerturbedOPT(cls(net.parameters(), lr=0.01), lipschitz="element", generator=generator, **MIXED)

    data, options = batches(6), dcp.StateDictOptions(full_state_dict=full)
    net, opt = new()
    run(net, opt, data[:3])
    opt.zero_grad()
    state = dcp.get_optimizer_state_dict(net, opt, options=options)
    assert set(state) == {"state", "param_groups"}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other_net, other = new()
    other_net.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(other_net, other, torch.load(buffer, weights_only=True), options=options)
    assert other._set.steps == 3
    run(net, opt, data[3:])
    run(other_net, other, data[3:])
    assert same_bits(net.parameters(), other_net.parameters())
    assert not any(key.startswith("popt") for p in net.parameters() for key in other.state.get(p, {}))


def test_creating_the_base_state_counts_no_step() -> None:
    """As torch.distributed.checkpoint does before it saves or loads: a step with zero gradients and a rate of 0."""
    net, opt = noisy_net()
    dcp.get_optimizer_state_dict(net, opt)
    assert opt.state_dict()["noise"]["state"] == {}
    assert opt._set.steps == 0


# ---- copies, schedulers, trainers ----


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_as_the_original(how: str, perturbed: bool) -> None:
    net, opt = noisy_net()
    data = batches(5)
    torch.optim.lr_scheduler.StepLR(opt, 1)  # patches step onto the instance: not picklable
    run(net, opt, data[:3])
    if perturbed:
        opt.ascend()
    pair = (net, opt)
    other_net, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert same_bits(net.parameters(), other_net.parameters())
    opt.restore()
    other.restore()
    assert same_bits(net.parameters(), other_net.parameters())
    original = weights(net)
    run(other_net, other, data[3:])
    assert same_bits(net.parameters(), original)
    run(net, opt, data[3:])
    assert same_bits(net.parameters(), other_net.parameters())


@pytest.mark.filterwarnings("error:Detected call of", "error:.*lr_scheduler")
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_schedulers_drive_the_rate_and_the_groups(way) -> None:
    net, opt = noisy_net()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for n, batch in enumerate(batches(3)):
        opt.param_groups[0]["popt_gamma"] = 0.1 * n
        way(net, opt, batch)
        scheduler.step()
        assert opt.base.param_groups[0]["lr"] == 0.1 * 0.5 ** (n + 1)


def test_step_hooks_fire_on_both_and_the_base_keeps_its_objects() -> None:
    net, opt = noisy_net()
    log: list[str] = []
    for name, target in (("wrapper", opt), ("base", opt.base)):
        target.register_step_pre_hook(lambda *_, n=name: log.append(f"pre {n}"))
        target.register_step_post_hook(lambda *_, n=name: log.append(f"post {n}"))
    run(net, opt, batches(1))
    assert log == ["pre wrapper", "pre base", "post base", "post wrapper"]
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.base.param_groups and opt.state is opt.base.state
    assert set(opt.state[net[0].weight]) == {"momentum_buffer"}


def test_add_param_group_has_sizes_of_its_own_and_begins_without_noise() -> None:
    net, opt = noisy_net()
    run(net, opt, batches(2))
    extra = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [extra], "popt_gamma": 0.5})
    assert (opt.param_groups[1]["popt_gamma"], opt.param_groups[1]["popt_eps"]) == (0.5, MIXED["eps"])
    moved = []
    for batch in batches(2):
        opt.zero_grad()
        before = extra.detach().clone()
        with opt.perturb():
            moved.append(not same_bits([extra], [before]))
            (loss_of(net, batch) + extra.sum()).backward()
        opt.step()
    assert moved == [False, True]
    with pytest.raises(ValueError, match=r"^popt_eps: -1.0"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "popt_eps": -1.0})


def test_two_steps_without_noise_warn_once() -> None:
    net, opt = noisy_net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(5):
            opt.zero_grad()
            backward(net, batch)
            opt.step()
    (message,) = [w for w in caught if "ran twice without a perturbation" in str(w.message)]
    assert "PerturbedOPT.step()" in str(message.message)
    assert message.filename == __file__


# ---- mixed precision ----


@pytest.mark.parametrize("fused_base", [True, False])
@pytest.mark.parametrize("style", ["context", "halves", "unscale"])
def test_the_curvature_sees_unscaled_gradients_and_no_skipped_step(fused_base: bool, style: str) -> None:
    net = small_net()
    generator = torch.Generator().manual_seed(7)
    opt = PerturbedOPT(momentum_sgd(net, fused=fused_base), generator=generator, **MIXED)
    plain, bare = noisy_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for n, batch in enumerate(batches(5)):
        before, h = weights(net), curvatures(opt)
        opt.zero_grad()
        opt.ascend()
        scaler.scale(loss_of(net, batch)).backward()
        if n == 3:
            net[0].weight.grad[0, 0, 0, 0] = math.inf
        if style != "halves":
            opt.restore()
        if style == "unscale":
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if n == 3:
            assert same_bits(net.parameters(), before)
            assert same_bits(curvatures(opt), h)
            with bare.perturb():
                pass  # the draw of the skipped step
            continue
        in_context(plain, bare, batch)
    assert scaler.get_scale() == 512.0
    assert opt._set.steps == 4
    # a power of two scales exactly; the fused kernels round otherwise, ours (halves) and torch's
    bound = 0.0 if style != "halves" and not fused_base else 1e-5
    assert distance(weights(net), weights(plain)) <= bound
    assert distance(curvatures(opt), curvatures(bare)) <= bound


# ---- BatchNorm ----


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def test_statistics_of_perturbed_passes_count_only_without_model() -> None:
    for given in (True, False):
        net = norm_net()
        opt = PerturbedOPT(momentum_sgd(net), model=net if given else None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(net, opt, batches(5))
        assert int(net[2].num_batches_tracked) == (1 if given else 5)  # the first pass is not perturbed
        assert sum("BatchNorm's statistics" in str(w.message) for w in caught) == given


@pytest.mark.filterwarnings("error:model. BatchNorm")
def test_statistics_follow_the_clean_forwards_of_the_loop() -> None:
    net, follower = norm_net(), norm_net()
    opt = PerturbedOPT(momentum_sgd(net), model=net, curvature="gnb", curvature_interval=1)
    for batch in batches(4):
        follower.load_state_dict({k: v for k, v in net.state_dict().items() if "running" not in k}, strict=False)
        for module in (net, follower):
            with torch.no_grad():
                module(batch[0])
        opt.update_curvature(lambda batch=batch: net(batch[0]))
        in_context(net, opt, batch)
        assert same_bits(net.buffers(), follower.buffers())
