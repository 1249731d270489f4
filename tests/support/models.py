"""What the tests of the wrappers share: small models and their data, ways to take a step, comparisons of weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatmin import SAM

Batch = tuple[Tensor, Tensor]
BaseBuilder = Callable[[Iterable[Any]], torch.optim.Optimizer]

#: Learning rates that train without a default of their own, by class name.
_LEARNING_RATES = {"SGD": 0.1, "ASGD": 0.1, "Adadelta": 1.0}


def small_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two convolutions and a linear layer: parameters of one, two and four dimensions, 1 to 144 elements."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return net.to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Batch]:
    """Inputs of :func:`small_net` with random labels."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)) for _ in range(count)]


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def backward(net: nn.Module, batch: Batch) -> Tensor:
    loss = loss_of(net, batch)
    loss.backward()
    return loss


def closure_of(net: nn.Module, opt: torch.optim.Optimizer, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        return backward(net, batch)

    return closure


# ---- the four ways to take a SAM step ----


def step_context(net: nn.Module, opt: SAM, batch: Batch) -> None:
    opt.zero_grad()
    backward(net, batch)
    with opt.perturb():
        backward(net, batch)
    opt.step()


def step_closure(net: nn.Module, opt: SAM, batch: Batch) -> None:
    opt.step(closure_of(net, opt, batch))


def step_davda54(net: nn.Module, opt: SAM, batch: Batch) -> None:
    backward(net, batch)
    opt.first_step(zero_grad=True)
    backward(net, batch)
    opt.second_step(zero_grad=True)


def step_halves(net: nn.Module, opt: SAM, batch: Batch) -> None:
    opt.zero_grad()
    backward(net, batch)
    opt.ascend()
    opt.zero_grad()
    backward(net, batch)
    opt.restore()
    opt.step()


def train(net: nn.Module, opt: SAM, data: Iterable[Batch], step: Callable[..., None] = step_context) -> None:
    for batch in data:
        step(net, opt, batch)


def train_bare(net: nn.Module, opt: torch.optim.Optimizer, data: Iterable[Batch]) -> None:
    for batch in data:
        opt.step(closure_of(net, opt, batch))


# ---- weights ----


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def raw(t: Tensor) -> Tensor:
    """The bytes of a tensor: unlike ``==``, they tell -0 from 0 and let NaN equal itself."""
    return t.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)


def same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest difference of two lists of tensors."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def set_grads(params: Iterable[Tensor], seed: int = 2) -> None:
    """Give every parameter a random gradient."""
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


# ---- base optimizers ----


def torch_optimizers() -> Iterator[type[torch.optim.Optimizer]]:
    """Every optimizer class of torch.optim."""
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass):
        if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            yield cls


def wrappable_optimizers() -> list[type[torch.optim.Optimizer]]:
    """Those that need no closure and take dense gradients."""
    return [cls for cls in torch_optimizers() if cls.__name__ not in ("LBFGS", "SparseAdam")]


def build(cls: type[torch.optim.Optimizer], params: Iterable[Any], **options: Any) -> torch.optim.Optimizer:
    """An optimizer of class ``cls`` with a rate at which :func:`small_net` trains."""
    return cls(params, lr=_LEARNING_RATES.get(cls.__name__, 1e-2), **options)


def trainable(cls: type[torch.optim.Optimizer], net: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``net`` that ``cls`` accepts: Muon takes matrices only."""
    return [p for p in net.parameters() if cls.__name__ != "Muon" or p.dim() == 2]


# ---- parameters without a model ----


def sgd(params: Iterable[Any], **options: Any) -> torch.optim.SGD:
    """SGD with a rate of 0.1."""
    return torch.optim.SGD(params, lr=0.1, **options)


def params_of(*values: list[float], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """One parameter per list of values."""
    return [nn.Parameter(torch.tensor(v, dtype=dtype)) for v in values]


def give_grads(params: list[nn.Parameter], *values: list[float]) -> None:
    """Set the gradients of ``params``."""
    for p, v in zip(params, values, strict=True):
        p.grad = torch.tensor(v, dtype=p.dtype)


def weights_after(count: int, rho: float = 0.1) -> list[Tensor]:
    """Weights after ``count`` steps of the README's loop."""
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=rho)
    for batch in batches(count):
        step_context(net, opt, batch)
    return weights(net)
