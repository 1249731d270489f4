"""Two processes on gloo: replicas stay equal, shards have one norm."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flatmin import SAM
from models import Batch, batches, distance, loss_of, same_bits, small_net, train, weights
from two_processes import WORLD, run_on_two


def gathered(tensors: list[Tensor]) -> list[list[Tensor]]:
    """``tensors`` of every rank."""
    flat = torch.cat([t.flatten() for t in tensors])
    everyone = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(everyone, flat)
    return [[f] for f in everyone]


def halves(batch: Batch, rank: int) -> Batch:
    return tuple(part.chunk(WORLD)[rank] for part in batch)


# ---- replicas ----


def _ddp_replicas(rank: int, per_rank: bool, bucket_view: bool) -> None:
    net = small_net()
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=bucket_view)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.1)
    start = weights(net)
    for batch in batches(25):
        part = halves(batch, rank)
        opt.zero_grad()
        with ddp.no_sync() if per_rank else contextlib.nullcontext():
            loss_of(ddp, part).backward()
        with opt.perturb():
            norms = torch.stack([n[0][0] for n in gathered([opt.last_norm.view(1)])])
            assert (norms[0] == norms[1]) == (not per_rank)
            loss_of(ddp, part).backward()
        opt.step()
        mine, other = gathered(list(net.parameters()))
        assert same_bits(mine, other)
    assert distance(weights(net), start) > 0.1


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("per_rank", [False, True])
def test_replicas_stay_bit_equal(per_rank: bool, bucket_view: bool) -> None:
    run_on_two(_ddp_replicas, per_rank, bucket_view)


def _ddp_backward(rank: int, bucket_view: bool) -> None:
    """backward() with no_sync equals the mean of each rank's own SAM gradient, and adds over micro-batches."""
    data = [halves(batch, rank) for batch in batches(2, torch.float64)]
    alone = small_net(torch.float64)
    SAM(torch.optim.SGD(alone.parameters(), lr=0.1), rho=0.1).backward(lambda i: loss_of(alone, data[i]), m=2)
    expected = [p.grad for p in alone.parameters()]
    for grad in expected:
        dist.all_reduce(grad)
        grad.div_(WORLD)
    net = small_net(torch.float64)
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=bucket_view)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    opt.backward(lambda i: loss_of(ddp, data[i]), m=2, no_sync=ddp.no_sync)
    assert distance([p.grad for p in net.parameters()], expected) < 1e-15
    opt.backward(lambda i: loss_of(ddp, data[i]), m=2, no_sync=ddp.no_sync)
    assert distance([p.grad / 2 for p in net.parameters()], expected) < 1e-15


@pytest.mark.parametrize("bucket_view", [False, True])
def test_backward_perturbs_each_rank_by_its_own_gradient(bucket_view: bool) -> None:
    run_on_two(_ddp_backward, bucket_view)


# ---- shards ----


def _fsdp2(rank: int, mesh_shape: tuple[int, ...], p: float, adaptive: bool | str) -> None:
    options: dict[str, Any] = {"rho": 0.1, "p": p, "adaptive": adaptive}
    data = batches(4, torch.float64)
    whole = small_net(torch.float64)
    reference = SAM(torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9), **options)
    sharded = small_net(torch.float64)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in (sharded[0], sharded[2], sharded[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    opt = SAM(torch.optim.SGD(sharded.parameters(), lr=0.1, momentum=0.9), **options)
    for batch in data:
        train(whole, reference, [batch])
        train(sharded, opt, [batch])  # the same batch on both ranks: its mean is that of one process
        assert float(opt.last_norm) == pytest.approx(float(reference.last_norm), rel=1e-12)
    full = [q.full_tensor().detach() for q in sharded.parameters()]
    assert distance(full, weights(whole)) < 1e-12


@pytest.mark.parametrize(("p", "adaptive"), [(2.0, False), (1.0, False), (3.0, True)])
def test_fsdp2_shards_have_the_norm_of_the_whole(p: float, adaptive: bool) -> None:
    run_on_two(_fsdp2, (WORLD,), p, adaptive)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_replicas_of_a_shard_count_once(p: float) -> None:
    run_on_two(_fsdp2, (WORLD, 1), p, False)


def _process_group(rank: int, p: float) -> None:
    values = [[3.0, 0.0], [4.0, -4.0]][rank]
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.5, p=p, sync=dist.group.WORLD)
    weight.grad = torch.tensor(values, dtype=torch.float64)
    opt.ascend()
    e = weight.detach().clone()
    opt.restore()
    whole = torch.tensor([3.0, 0.0, 4.0, -4.0], dtype=torch.float64)
    q = math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)
    assert float(opt.last_norm) == pytest.approx(float(torch.linalg.vector_norm(whole, ord=q)), rel=1e-14)
    everywhere = torch.cat([part[0] for part in gathered([e])])
    assert float(torch.linalg.vector_norm(everywhere, ord=p)) == pytest.approx(0.5, rel=1e-11)
    weight.grad = torch.tensor([1.0, math.nan if rank == 0 else 1.0], dtype=torch.float64)
    with opt.perturb():  # a NaN on one rank stops them all
        assert not weight.any()
    weight.grad = None if rank == 0 else torch.ones_like(weight)
    with opt.perturb():  # a rank without gradients still takes part
        assert float(opt.last_norm) == pytest.approx(float(torch.linalg.vector_norm(torch.ones(2), ord=q)))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_a_process_group_shares_one_norm(p: float) -> None:
    run_on_two(_process_group, p)
