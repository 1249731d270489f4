"""PerturbedOPT in two processes on gloo: replicas and shards, common noise and each rank's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from test_sam_distributed import gathered, halves
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flatmin import PerturbedOPT, ops
from models import Batch, batches, distance, loss_of, same_bits, small_net, weights
from popt_reference import MIXED, in_context, momentum_sgd, run
from two_processes import WORLD, run_on_two


def noisy(net: nn.Module, **options: Any) -> PerturbedOPT:
    generator = torch.Generator().manual_seed(7)
    return PerturbedOPT(momentum_sgd(net), generator=generator, **(MIXED | options))


def curvature(opt: PerturbedOPT) -> list[Tensor]:
    return [entry["curvature"] for entry in opt.state_dict()["noise"]["state"].values()]


def same_on_both(tensors: list[Tensor]) -> bool:
    mine, other = gathered(tensors)
    return same_bits(mine, other)


# ---- replicas ----


def _replicas_stay_equal(rank: int, sync: str) -> None:
    net = small_net()
    ddp, opt = DistributedDataParallel(net), noisy(net, sync=sync)
    for n, batch in enumerate(batches(8)):
        opt.zero_grad()
        with opt.perturb():
            assert same_on_both(list(net.parameters())) == (n == 0 or sync == "common")
            loss_of(ddp, halves(batch, rank)).backward()
        opt.step()
        assert same_on_both(list(net.parameters()))
        assert same_on_both(curvature(opt))
        assert same_on_both([opt._set.rho.view(1)])
    assert distance(weights(net), weights(small_net())) > 0.1


def _estimates_are_averaged(rank: int, source: str) -> None:
    net = small_net(torch.float64)
    opt = noisy(net, curvature=source, sync=dist.group.WORLD, beta1=0.0)
    params, batch = list(net.parameters()), halves(batches(1, torch.float64)[0], rank)
    if source == "hutchinson":
        opt.update_curvature(lambda: loss_of(net, batch))
        probes = [torch.empty_like(p) for p in params]
        ops.probe_(probes, ops.random_key(opt._set.seed, 0, 2**15))
        first = torch.autograd.grad(loss_of(net, batch), params, create_graph=True)
        expected = [v * hv for v, hv in zip(probes, torch.autograd.grad(first, params, probes), strict=True)]
        for t in expected:
            dist.all_reduce(t)
            t.div_(WORLD)
    else:
        opt.update_curvature(lambda: net(batch[0]))
        uniform = torch.empty(4, 3)
        ops.probe_([uniform], ops.random_key(opt._set.seed, 0, 2**15 + rank), distribution="uniform")
        logits = net(batch[0])
        labels = (logits.detach().float() - (-(0.5 * uniform + 0.5).log()).log()).argmax(1)
        grads = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), params)
        for g in grads:
            dist.all_reduce(g)
        expected = [8 * (g / WORLD) ** 2 for g in grads]  # 8 labels on both ranks together
    assert distance(curvature(opt), expected) < 1e-14
    assert same_on_both(curvature(opt))


def _replicas(rank: int) -> None:
    for sync in ("common", "per_rank"):
        _replicas_stay_equal(rank, sync)
    for source in ("hutchinson", "gnb"):
        _estimates_are_averaged(rank, source)


def test_replicas_with_common_noise_and_with_their_own() -> None:
    run_on_two(_replicas)


# ---- shards ----


def _sharded(**options: Any) -> tuple[nn.Module, PerturbedOPT]:
    net = small_net(torch.float64)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (net[0], net[2], net[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, noisy(net, **options)


def _shards_average_as_the_whole(data: list[Batch]) -> None:
    """Without noise, for it is drawn for each shard."""
    whole = small_net(torch.float64)
    reference, (net, opt) = noisy(whole, start=100), _sharded(start=100)
    run(whole, reference, data)
    run(net, opt, data)  # the same batch on both ranks: its mean is that of one process
    assert distance([h.full_tensor() for h in curvature(opt)], curvature(reference)) < 1e-12
    assert distance([p.full_tensor().detach() for p in net.parameters()], weights(whole)) < 1e-12


def _shards_draw_for_themselves(rank: int, data: list[Batch]) -> None:
    net, opt = _sharded(lipschitz="max")
    run(net, opt, data)
    before = [p.to_local().detach().clone() for p in net.parameters()]
    with opt.perturb():
        moved = [p.to_local().detach().clone() for p in net.parameters()]
        shares = []
        for w, v, entry in zip(before, moved, opt._set.states.values(), strict=True):
            n = MIXED["gamma"] * w.abs() + MIXED["eps"]
            c = entry.curvature.to_local() / (1 - MIXED["beta1"] ** len(data)) + opt._set.rho * n
            shares.append((v - w) / torch.minimum(MIXED["scale"] / c.sqrt(), n))
    bias = [s for s in shares if s.numel()][1]  # as long on both ranks
    mine, other = gathered([bias])
    assert distance(mine, other) > 1e-3
    assert float(torch.cat([s.flatten() for s in shares]).abs().max()) <= 1.0 + 1e-12
    assert same_bits([p.to_local() for p in net.parameters()], before)
    assert same_on_both([opt._set.rho.view(1)])


def _squares(params: list[Tensor]) -> list[Tensor]:
    return [p.detach() ** 2 for p in params]


def _shards_resume(data: list[Batch], full: bool, **own: Any) -> None:
    options = dcp.StateDictOptions(full_state_dict=full)
    net, opt = _sharded(**own)
    run(net, opt, data[:3])
    weights_then = copy.deepcopy(dcp.get_model_state_dict(net, options=options))
    opt.zero_grad()
    state = copy.deepcopy(dcp.get_optimizer_state_dict(net, opt, options=options))
    run(net, opt, data[3:])
    other_net, other = _sharded(**own)
    dcp.set_model_state_dict(other_net, weights_then, options=options)
    dcp.set_optimizer_state_dict(other_net, other, state, options=options)
    for batch in data[3:]:
        in_context(other_net, other, batch)
    assert same_bits([p.to_local() for p in other_net.parameters()], [p.to_local() for p in net.parameters()])


def _shards(rank: int) -> None:
    data = batches(5, torch.float64)
    _shards_average_as_the_whole(data)
    _shards_draw_for_themselves(rank, data)
    for full in (False, True):
        _shards_resume(data, full, lipschitz="element")
        _shards_resume(data, full, curvature=_squares, curvature_interval=1)


def test_shards_of_fsdp2() -> None:
    run_on_two(_shards)
