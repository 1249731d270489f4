"""Models that are called from around what ``same_rng`` watches, and bases with methods and attributes of their own."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from test_user_loops import Averaging
from torch import Tensor, nn

from flatmin import SAM, PerturbedOPT
from models import batches, same_bits, sgd

# ---- same_rng ----


class Masked(nn.Module):
    """Keeps the mask of each training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.masks = nn.Linear(36, 3), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(nn.functional.dropout(torch.ones(36), 0.5, self.training))
        return self.linear(x.flatten(1) * self.masks[-1])


def _two_models(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: sum(part(x) for part in net)  # type: ignore[return-value, attr-defined]


#: What is given as model=, and how the loop calls it in each pass.
UNSEEN: dict[str, tuple[str, Callable[[], nn.Module], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a list of two models": ("first", lambda: nn.ModuleList([Masked(), Masked()]), _two_models, _two_models),
    "forward() in the first pass": ("first", Masked, lambda net: net.forward, lambda net: net),
    "forward() in the second pass": ("second", Masked, lambda net: net, lambda net: net.forward),
}


@pytest.mark.parametrize(("which", "build", "first", "second"), UNSEEN.values(), ids=UNSEEN)
def test_same_rng_says_which_pass_it_did_not_see(
    which: str, build: Callable[[], nn.Module], first: Callable[[Any], Any], second: Callable[[Any], Any]
) -> None:
    net = build()
    opt = SAM(sgd(net.parameters()), rho=0.1, model=net, same_rng=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(3):
            opt.zero_grad()
            nn.functional.cross_entropy(first(net)(x), y).backward()
            with opt.perturb():
                nn.functional.cross_entropy(second(net)(x), y).backward()
            opt.step()
    assert [str(w.message).startswith(f"same_rng: the {which} pass did not call the module") for w in caught] == [True]


def test_same_rng_is_silent_where_the_second_pass_failed() -> None:
    net, (x, y) = Masked(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.1, model=net, same_rng=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.functional.cross_entropy(net(x), y).backward()
        with pytest.raises(ZeroDivisionError), opt.perturb():
            _ = 1 / 0
        nn.functional.cross_entropy(net(x), y).backward()
        with opt.perturb():
            nn.functional.cross_entropy(net(x), y).backward()
        opt.step()


class Around(nn.Module):
    """As DataParallel and its kin: calls what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        output: Tensor = self.module(*args)
        return output


SEEN: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "a wrapper": Around,
    "functional_call": lambda net: lambda x: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("call", SEEN.values(), ids=SEEN)
def test_same_rng_sees_calls_from_around_the_model(call: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    torch.manual_seed(0)
    net = Masked()
    opt, run = SAM(sgd(net.parameters()), rho=0.1, model=net, same_rng=True), call(net)
    for x, y in batches(2):
        opt.zero_grad()
        nn.functional.cross_entropy(run(x), y).backward()
        with opt.perturb():
            nn.functional.cross_entropy(run(x), y).backward()
        opt.step()
    assert same_bits(net.masks[::2], net.masks[1::2])
    assert not torch.equal(net.masks[0], net.masks[2])


# ---- methods and attributes of the base ----


class Foreign(torch.optim.SGD):
    """Somebody else's wrapper: what it lacks is its inner optimizer's, and its mode is a property."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.inner = Averaging([p for group in self.param_groups for p in group["params"]])
        self.warmup = 10

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def train(self, mode: bool = True) -> None:
        self.inner.mode = "train" if mode else "eval"

    @property
    def averaged(self) -> bool:
        return self.inner.mode == "eval"

    @averaged.setter
    def averaged(self, value: bool) -> None:
        self.train(not value)


@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_methods_with_arguments_and_properties_of_the_base_are_reached(wrap: Callable[..., Any]) -> None:
    opt = wrap(Foreign([nn.Parameter(torch.ones(2))]))
    opt.train(mode=False)
    assert opt.averaged
    assert opt.mode == "eval"  # of the innermost
    opt.averaged = False  # set where it is read, and nowhere else
    assert opt.base.inner.mode == "train"
    opt.warmup = 3
    assert opt.base.warmup == 3
    assert not {"averaged", "warmup"} & set(vars(opt))
    opt.note = "mine"
    assert not hasattr(opt.base, "note")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_a_copy_switches_its_own_base(wrap: Callable[..., Any], copied: Callable[[Any], Any]) -> None:
    opt = wrap(Averaging([nn.Parameter(torch.ones(2))]))
    other = copied(opt)
    other.eval()
    other.mode += "!"
    assert other.base.mode == "eval!"
    assert opt.mode == "train"


@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_a_base_without_a_mode_shows_none(wrap: Callable[..., Any]) -> None:
    """Trainers ask before they call."""
    opt = wrap(sgd([nn.Parameter(torch.ones(2))]))
    assert not hasattr(opt, "train")
    assert not callable(getattr(opt, "eval", None))


@pytest.mark.parametrize(
    ("name", "key"),
    [("rho", "sam_rho"), ("adaptive", "sam_adaptive"), ("scale", "popt_scale"), ("gamma", "popt_gamma")],
)
def test_a_radius_that_is_set_on_the_wrapper_is_refused(name: str, key: str) -> None:
    """Nobody would read it: the groups have it."""
    wrap = SAM if key.startswith("sam") else PerturbedOPT
    opt = wrap(sgd([nn.Parameter(torch.ones(2))]))
    with pytest.raises(AttributeError, match=rf"\.{name}: 0.2 given, .* set group\['{key}'\]"):
        setattr(opt, name, 0.2)
    for group in opt.param_groups:
        group[key] = 0.2
