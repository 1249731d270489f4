"""DistributedDataParallel, one perturbation for all ranks or one for each.

    torchrun --nproc_per_node 2 examples/trainers/ddp.py                # one: of the averaged gradient
    torchrun --nproc_per_node 2 examples/trainers/ddp.py --per-rank     # m-sharpness: of each rank's own

DDP has averaged the first gradient when SAM reads it, so that every rank moves by the same perturbation without any
communication of ours. For one per rank neither forward nor backward of the first pass may be reduced: that is
``no_sync``, and ``opt.backward`` puts it around both.
"""

from __future__ import annotations

import argparse

import _toy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flatmin


def train(net: nn.Module, data: list[_toy.Batch], per_rank: bool = False) -> None:
    model = DistributedDataParallel(net)
    opt = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=net)
    for x, y in data:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(model(x), y)

        opt.zero_grad()
        if per_rank:
            opt.backward(loss, no_sync=model.no_sync)
        else:
            loss().backward()
            with opt.perturb():
                loss().backward()
        opt.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-rank", action="store_true", help="each rank perturbs by its own gradient")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="file for the weights of every rank")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net = _toy.net()
    shard = [(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in _toy.batches(args.steps)]
    train(net, shard, args.per_rank)
    replicas = [None] * world
    dist.all_gather_object(replicas, net.state_dict())
    if rank == 0:
        print(f"{args.steps} steps on {world} ranks")
        if args.out:
            torch.save(replicas, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
