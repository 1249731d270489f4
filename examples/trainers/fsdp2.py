"""FSDP2 with checkpoints of torch.distributed.checkpoint, which another number of ranks can load.

    torchrun --nproc_per_node 2 examples/trainers/fsdp2.py --steps 10 --save out/checkpoint
    torchrun --nproc_per_node 1 examples/trainers/fsdp2.py --steps 10 --load out/checkpoint

The norm of the perturbation is over all shards: SAM finds the DTensors by itself.
"""

from __future__ import annotations

import argparse

import _toy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import flatmin


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = _toy.net()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    return net, flatmin.SAM(torch.optim.AdamW(net.parameters(), lr=0.01), rho=0.05, model=net)


def train(net: nn.Module, opt: flatmin.SAM, data: list[_toy.Batch]) -> None:
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with opt.perturb():
            F.cross_entropy(net(x), y).backward()
        opt.step()


def save(folder: str, net: nn.Module, opt: torch.optim.Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(net, opt)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder: str, net: nn.Module, opt: torch.optim.Optimizer) -> None:
    model_state, optimizer_state = get_state_dict(net, opt)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(net, opt, model_state_dict=model_state, optim_state_dict=optimizer_state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=0, help="batches that an earlier run has seen")
    parser.add_argument("--load", help="folder of a checkpoint")
    parser.add_argument("--save", help="folder for a checkpoint")
    parser.add_argument("--out", help="file for the whole weights")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net, opt = build()
    if args.load:
        load(args.load, net, opt)
    data = _toy.batches(args.skip + args.steps)[args.skip :]
    train(net, opt, [(x.chunk(world)[rank], y.chunk(world)[rank]) for x, y in data])
    if args.save:
        save(args.save, net, opt)
    whole = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        print(f"{args.steps} steps on {world} ranks")
        if args.out:
            torch.save(whole, args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
