"""Estimates of the Hessian's diagonal from what a training step has: a closure, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import ops
from ..._distributed import rank
from ..._double_backward import explained_double_backward
from ...curvature._diagonals import diagonal_block
from ...curvature._labels import sampled_cross_entropy
from ...ops._softmax_labels import draw_labels
from ._noise_bucket import NoiseBucket, Subset, local
from ._noise_set import STREAMS, NoiseSet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FROM_LOSS", "learn_from_callable", "learn_from_gnb"]

_Groups = Sequence[dict[str, Any]]
_Sources = list[list[Tensor]]

_EXACT_LIMIT = 20_000  # parameters, each of which costs a double backward pass
_TWICE = "Give curvature='gnb', 'fisher', 'squared_gradient' or a callable"


def learn_from_gnb(
    noise: NoiseSet, groups: _Groups, closure: Callable[[], Any], loss_fn: Any = None, class_dim: int | None = None
) -> bool:
    """Gauss-Newton-Bartlett: ``B g^ o g^`` with the gradient ``g^`` of the mean cross-entropy for ``B`` labels drawn
    from the model's own softmax (Liu et al. 2023, arXiv 2305.14342, Algorithm 2). False if all labels are ignored."""
    buckets = _plain_buckets(noise, groups)
    result = closure()
    logits, targets = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        raise TypeError(
            f"closure: gave {_described(logits)}, but curvature='gnb' needs logits of shape (predictions, classes), or "
            "a pair (logits, targets)"
        )
    # each rank draws for its own rows
    key = ops.random_key(noise.seed, noise.estimates, STREAMS + rank(), logits.device)
    if targets is not None:
        loss, count = sampled_cross_entropy(logits, targets, key, loss_fn, class_dim)
    else:
        rows = _rows(logits, class_dim)
        labels = draw_labels(rows.detach(), key)
        loss, count = torch.nn.functional.cross_entropy(rows, labels), len(labels)
    subsets, sources = _subsets(noise, buckets, torch.autograd.grad(loss, _params(buckets), allow_unused=True))
    total = _average(sources, count, _group(noise))
    if total:
        noise.learn_from_estimates(subsets, sources, [None] * len(subsets), source="square", source_scale=total)
    return bool(total)


def _rows(logits: Tensor, class_dim: int | None) -> Tensor:
    """Logits as (predictions, classes), where no targets say which dimension holds the classes."""
    if class_dim is None:
        if logits.dim() > 2:
            raise TypeError(
                f"closure: gave logits of {_described(logits)} alone; return (logits, targets), or give class_dim="
            )
        return logits
    if not -logits.dim() <= class_dim < logits.dim():
        raise ValueError(f"class_dim: {class_dim} given for logits of {_described(logits)}")
    return logits.movedim(class_dim, -1).flatten(0, -2)


def _learn_from_fisher(noise: NoiseSet, groups: _Groups, closure: Callable[[], Any]) -> bool:
    """The empirical Fisher matrix's diagonal: the mean of the squared gradients of the samples' losses, a backward pass
    for each. False if there are none."""
    buckets = _plain_buckets(noise, groups)
    losses = closure()
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        raise TypeError(
            f"closure: gave {_described(losses)}, but curvature='fisher' needs the loss of each sample, in one "
            "dimension (reduction='none')"
        )
    params, mean = _params(buckets), dict[int, Tensor]()
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, params, retain_graph=i + 1 < len(losses), allow_unused=True)
        for place, g in enumerate(grads):
            if g is not None:
                wide = g.detach().to(torch.promote_types(g.dtype, torch.float32))
                mean[place] = mean.get(place, torch.zeros_like(wide)).addcmul_(wide, wide, value=1.0 / len(losses))
    subsets, sources = _subsets(noise, buckets, [mean.get(place) for place in range(len(params))])
    total = _average(sources, len(losses), _group(noise))
    if total:
        noise.learn_from_estimates(subsets, sources, [None] * len(subsets), source="plain")
    return bool(total)


def _loss(closure: Callable[[], Any], kind: str) -> Tensor:
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"closure: gave {_described(loss)}, but curvature={kind!r} needs the loss, with its graph")
    return loss


def _described(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _learn_from_exact(noise: NoiseSet, groups: _Groups, closure: Callable[[], Any]) -> bool:
    """The Hessian's diagonal itself: a double backward pass for each element."""
    buckets = _plain_buckets(noise, groups)
    params = _params(buckets)
    elements = sum(p.numel() for p in params)
    if elements > _EXACT_LIMIT:
        raise ValueError(
            f"curvature: 'exact' costs a double backward pass for each of {elements} parameters, and takes at most "
            f"{_EXACT_LIMIT}; give 'hutchinson'"
        )
    first = torch.autograd.grad(_loss(closure, "exact"), params, create_graph=True, allow_unused=True)
    values = [diagonal_block(g, p, _TWICE) for g, p in zip(first, params, strict=True)]
    linear = [None if g is None else torch.zeros_like(p) for g, p in zip(first, params, strict=True)]
    subsets, sources = _subsets(noise, buckets, [z if x is None else x for x, z in zip(values, linear, strict=True)])
    _average(sources, 1, _group(noise))
    noise.learn_from_estimates(subsets, sources, [None] * len(subsets), source="plain")
    return True


def _learn_from_hutchinson(noise: NoiseSet, groups: _Groups, closure: Callable[[], Any]) -> bool:
    """``v o H v`` with a Rademacher vector ``v`` (Bekas et al. 2007). ``v`` is common to all ranks."""
    buckets = _plain_buckets(noise, groups)
    loss = _loss(closure, "hutchinson")
    first = torch.autograd.grad(loss, _params(buckets), create_graph=True, allow_unused=True)
    subsets, gradients = _subsets(noise, buckets, first)
    keys = [ops.random_key(noise.seed, noise.estimates, STREAMS + i, q.bucket.device) for i, q in enumerate(subsets)]
    probes = [[torch.empty_like(p, requires_grad=False) for p in subset.params] for subset in subsets]
    for v, key in zip(probes, keys, strict=True):
        ops.probe_(v, key)
    params = [p for subset in subsets for p in subset.params]
    pairs = [(g, v) for gs, vs in zip(gradients, probes, strict=True) for g, v in zip(gs, vs, strict=True)]
    pairs = [(g, v) for g, v in pairs if g.requires_grad]  # the loss is linear in the others
    products: Sequence[Tensor] = [torch.zeros_like(p) for p in params]
    if pairs:
        outputs, vectors = zip(*pairs, strict=True)
        with explained_double_backward(_TWICE):
            products = torch.autograd.grad(outputs, params, vectors, materialize_grads=True)
    remaining = iter(products)
    sources = [[next(remaining) for _ in subset.params] for subset in subsets]
    _average(sources, 1, _group(noise))
    noise.learn_from_estimates(subsets, sources, keys, source="probed")
    return True


#: Estimators of a closure that returns the loss, or the losses of samples.
FROM_LOSS: dict[str, Callable[[NoiseSet, _Groups, Callable[[], Any]], bool]] = {
    "hutchinson": _learn_from_hutchinson,
    "exact": _learn_from_exact,
    "fisher": _learn_from_fisher,
}


def learn_from_callable(noise: NoiseSet, groups: _Groups, curvature: Callable[[list[Tensor]], Any]) -> None:
    """What ``curvature(params)`` returns, as it is."""
    buckets = noise.gather(groups)
    params = _params(buckets)
    if not params:
        return
    estimates = curvature(params)
    if not isinstance(estimates, Sequence) or len(estimates) != len(params):
        given = f"{len(estimates)} tensors" if isinstance(estimates, Sequence) else type(estimates).__name__
        raise TypeError(f"curvature: gave {given} for {len(params)} parameters; give one tensor, or None, for each")
    for p, estimate in zip(params, estimates, strict=True):
        if estimate is not None and (not isinstance(estimate, Tensor) or estimate.shape != p.shape):
            given = f"shape {tuple(estimate.shape)}" if isinstance(estimate, Tensor) else type(estimate).__name__
            raise TypeError(f"curvature: gave {given} for a parameter of shape {tuple(p.shape)}")
    subsets, sources = _subsets(noise, buckets, estimates)
    _average(sources, 1, _group(noise))
    noise.learn_from_estimates(subsets, sources, [None] * len(subsets), source="plain")


def _group(noise: NoiseSet) -> ProcessGroup | None:
    return None if isinstance(noise.settings.sync, str) else noise.settings.sync


def _params(buckets: Sequence[NoiseBucket]) -> list[Tensor]:
    return [p for bucket in buckets for p in bucket.params]


def _plain_buckets(noise: NoiseSet, groups: _Groups) -> list[NoiseBucket]:
    buckets = noise.gather(groups)
    if any(bucket.shards is not None for bucket in buckets):
        raise RuntimeError(
            f"curvature: {noise.settings.curvature!r} cannot differentiate by sharded parameters; use "
            "'squared_gradient' or a callable"
        )
    return buckets


def _subsets(
    noise: NoiseSet, buckets: Sequence[NoiseBucket], values: Sequence[Tensor | None]
) -> tuple[list[Subset], _Sources]:
    """What of each bucket has a value, and the values. With a process group, on which each rank may lack others, all
    of it has one: 0 if need be."""
    fill = _group(noise) is not None
    remaining = iter(values)
    subsets, sources = [], []
    for bucket in buckets:
        own = [next(remaining) for _ in bucket.params]
        if fill:
            own = [torch.zeros_like(p) if x is None else x for p, x in zip(bucket.params, own, strict=True)]
        present = [x is not None for x in own]
        if any(present):
            subsets.append(Subset(bucket, present, noise.settings.lipschitz == "element"))
            sources.append([local(x) for x in own if x is not None])
    return subsets, sources


@torch.no_grad()
def _average(sources: _Sources, weight: int, group: ProcessGroup | None) -> float:
    """Replace ``sources`` by their mean over the ranks, each counted ``weight`` times; return the sum of the weights.
    One collective for each type and device."""
    if group is None:
        return float(weight)
    kinds: dict[Any, list[tuple[int, int]]] = {}
    for i, part in enumerate(sources):
        for j, x in enumerate(part):
            kinds.setdefault((x.device, torch.promote_types(x.dtype, torch.float32)), []).append((i, j))
    total = float(weight)
    for (device, dtype), places in kinds.items():
        weights = torch.tensor([float(weight)], dtype=dtype, device=device)
        flat = torch.cat([weights, *(sources[i][j].to(dtype).flatten() * weight for i, j in places)])
        torch.distributed.all_reduce(flat, group=group)
        total = float(flat[0])
        parts = (flat[1:] / flat[0]).split([sources[i][j].numel() for i, j in places])  # type: ignore[no-untyped-call]
        for (i, j), part in zip(places, parts, strict=True):
            like = sources[i][j]
            sources[i][j] = torch.empty_like(like, dtype=dtype).copy_(part.view(like.shape))
    return total
