"""Where PerturbedOPT's curvature comes from: sources, batches in place of closures, warm-up at learning rate 0."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import PerturbedOPT, curvature, ops
from flatmin.ops._softmax_labels import draw_labels
from flatmin.optim import Lion
from models import backward, batches, distance, loss_of, same_bits, sgd, small_net, weights
from popt_reference import curvatures, momentum_sgd, run


def fed(net: nn.Module, kind: str, *args: Any, model: nn.Module | None = None, **options: Any) -> list[Tensor]:
    """``h`` after one estimate, with nothing averaged into it before."""
    opt = PerturbedOPT(
        sgd(net.parameters()), curvature=kind, beta1=0.0, model=model, generator=torch.Generator().manual_seed(4)
    )
    assert opt.update_curvature(*args, **options)
    assert all(p.grad is None for p in net.parameters())
    return curvatures(opt)


# ---- sources ----


def test_exact_is_the_diagonal_of_the_hessian() -> None:
    net, batch = small_net(torch.float64), batches(1, torch.float64)[0]
    found = fed(net, "exact", lambda: loss_of(net, batch))
    assert distance(found, curvature.exact_diag(net, F.cross_entropy, batch)) < 1e-13
    assert any(bool((h < 0.0).any()) for h in found)  # kept as it is; its noise takes 0


def test_exact_of_parameters_that_the_loss_is_linear_in_or_without() -> None:
    a, b, c = (nn.Parameter(torch.tensor([x])) for x in (2.0, 3.0, 4.0))
    opt = PerturbedOPT(sgd([a, b, c]), curvature="exact", beta1=0.0)
    assert opt.update_curvature(lambda: (a**3).sum() + b.sum())
    assert [t.item() for t in curvatures(opt)] == [12.0, 0.0]


def test_exact_refuses_what_would_take_for_ever() -> None:
    opt = PerturbedOPT(sgd([nn.Parameter(torch.zeros(20_001))]), curvature="exact")
    with pytest.raises(ValueError, match="curvature: 'exact' costs a double backward pass for each of 20001"):
        opt.update_curvature(lambda: pytest.fail("not called"))


def test_fisher_is_the_mean_of_the_squared_gradients_of_single_samples() -> None:
    net, (x, y) = small_net(torch.float64), batches(1, torch.float64)[0]
    found = fed(net, "fisher", lambda: F.cross_entropy(net(x), y, reduction="none"))
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(y)):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        for e, g in zip(expected, grads, strict=True):
            e.add_(g * g / len(y))
    assert distance(found, expected) < 1e-15
    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
    assert distance(found, curvature.squared_gradient_diag(net, F.cross_entropy, singles)) < 1e-15


@pytest.mark.parametrize("kind", ["exact", "fisher"])
def test_their_noise_trains(kind: str) -> None:
    net = small_net()
    opt = PerturbedOPT(momentum_sgd(net), curvature=kind, curvature_interval=2)
    for x, y in batches(4):
        reduction = "none" if kind == "fisher" else "mean"
        opt.update_curvature(lambda x=x, y=y, r=reduction: F.cross_entropy(net(x), y, reduction=r))
        run(net, opt, [(x, y)])
    assert opt._set.estimates == 2
    assert float(opt.noise_stats.mean_sigma) > 0.0


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("exact", torch.ones(3), r"closure: gave shape \(3,\), but curvature='exact' needs the loss"),
        (
            "fisher",
            torch.tensor(1.0),
            r"closure: gave shape \(\), but curvature='fisher' needs the loss of each sample",
        ),
        ("fisher", None, "closure: gave NoneType, but curvature='fisher'"),
        ("gnb", (torch.ones(3), torch.ones(3)), r"closure: gave shape \(3,\), but curvature='gnb' needs logits"),
        ("gnb", torch.ones(2, 3, 4), r"closure: gave logits of shape \(2, 3, 4\) alone; return \(logits, targets\)"),
    ],
)
def test_what_a_closure_gives_is_checked(kind: str, value: Any, message: str) -> None:
    opt = PerturbedOPT(sgd([nn.Parameter(torch.ones(2))]), curvature=kind)
    with pytest.raises(TypeError, match=message):
        opt.update_curvature(lambda: value)


# ---- logits of more dimensions, labels that are ignored ----


class Tagger(nn.Module):
    """Logits for every position of a sequence: (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor, scale: float = 1.0) -> Any:
        return UserDict(logits=self.head(self.table(input_ids)) * scale)


def sequences(ignored: int = -100) -> dict[str, Tensor]:
    """Half of the second sequence is padding."""
    g = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(11, (2, 6), generator=g), "labels": torch.randint(5, (2, 6), generator=g)}
    batch["labels"][1, 3:] = ignored
    return batch


def logits_and_labels(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch["input_ids"])["logits"], batch["labels"]


def test_ignored_labels_are_neither_drawn_for_nor_counted() -> None:
    """9 of 12 positions count: as if the batch held no others."""
    net, batch = Tagger().double(), sequences()
    found = fed(net, "gnb", lambda: logits_and_labels(net, batch))
    kept = batch["labels"].flatten() != -100
    key = ops.random_key(opt_seed(), 0, 2**15)
    rows = net(batch["input_ids"])["logits"].flatten(0, 1)
    labels = draw_labels(rows.detach(), key)
    loss = F.cross_entropy(rows[kept], labels[kept])
    expected = [9.0 * g * g for g in torch.autograd.grad(loss, list(net.parameters()))]
    assert distance(found, expected) < 1e-14


def opt_seed() -> int:
    return int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("how", ["targets", "class_dim", "rows", "classes in dimension 1"])
def test_the_classes_are_found_in_any_dimension(how: str) -> None:
    """Without ignored labels all of these are the same estimate."""
    net, batch = Tagger().double(), sequences(ignored=0)

    def logits() -> Tensor:
        return net(batch["input_ids"])["logits"]

    expected = fed(net, "gnb", lambda: logits().flatten(0, 1))
    if how == "targets":
        found = fed(net, "gnb", lambda: (logits(), batch["labels"]))
    elif how == "class_dim":
        found = fed(net, "gnb", logits, class_dim=-1)
    elif how == "rows":
        found = fed(net, "gnb", lambda: (logits().flatten(0, 1), batch["labels"].flatten()))
    else:
        found = fed(net, "gnb", lambda: (logits().transpose(1, 2), batch["labels"]), loss_fn=F.cross_entropy)
    assert distance(found, expected) < 1e-14


def test_an_ambiguous_dimension_is_asked_for() -> None:
    w = nn.Parameter(torch.ones(4, 3, 3))
    opt = PerturbedOPT(sgd([w]), curvature="gnb")
    with pytest.raises(ValueError, match="class_dim: needed, for targets of shape"):
        opt.update_curvature(lambda: (w, torch.zeros(4, 3, dtype=torch.int64)))
    assert opt.update_curvature(lambda: (w, torch.zeros(4, 3, dtype=torch.int64)), class_dim=2)
    with pytest.raises(ValueError, match="class_dim: 3 given for logits"):
        PerturbedOPT(sgd([w]), curvature="gnb").update_curvature(lambda: w, class_dim=3)


def test_a_batch_of_ignored_labels_is_no_estimate() -> None:
    net, batch = Tagger(), sequences()
    batch["labels"].fill_(7)
    opt = PerturbedOPT(sgd(net.parameters()), curvature="gnb")
    ignoring = nn.CrossEntropyLoss(ignore_index=7)

    def call() -> bool:
        return opt.update_curvature(lambda: logits_and_labels(net, batch), loss_fn=ignoring, class_dim=2)

    assert call() is False
    assert not opt._set.states
    batch["labels"][0, 0] = 1
    assert call() is True


# ---- batches ----


@pytest.mark.parametrize("kind", ["gnb", "hutchinson", "exact", "fisher"])
def test_a_batch_is_what_its_closure_is(kind: str) -> None:
    """A pair, through the model of the constructor."""
    net, (x, y) = small_net(torch.float64), batches(1, torch.float64)[0]
    closures: dict[str, Callable[[], Any]] = {
        "gnb": lambda: net(x),
        "fisher": lambda: F.cross_entropy(net(x), y, reduction="none"),
    }
    expected = fed(net, kind, closures.get(kind, lambda: F.cross_entropy(net(x), y)))
    assert distance(fed(net, kind, (x, y), model=net, loss_fn=F.cross_entropy), expected) < 1e-14
    assert distance(fed(net, kind, [x, y], model=net, loss_fn=F.cross_entropy), expected) < 1e-14


@pytest.mark.parametrize("container", [dict, UserDict])
@pytest.mark.parametrize("kind", ["gnb", "hutchinson", "fisher"])
def test_a_mapping_goes_through_forward(kind: str, container: Any) -> None:
    net, batch = Tagger().double(), sequences()

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def closure() -> Any:
        logits, labels = logits_and_labels(net, batch)
        if kind == "gnb":
            return logits, labels
        if kind == "fisher":
            return torch.stack([loss_fn(a, b) for a, b in zip(logits, labels, strict=True)])
        return loss_fn(logits, labels)

    expected = fed(net, kind, closure)
    given = container(batch)
    found = fed(net, kind, given, forward=lambda _, b: logits_and_labels(net, b), loss_fn=loss_fn)
    assert distance(found, expected) < 1e-14
    found = fed(net, kind, given, model=net, forward=logits_and_labels, loss_fn=loss_fn)
    assert distance(found, expected) < 1e-14


def test_a_model_that_computes_its_own_loss() -> None:
    net, batch = Tagger().double(), sequences()

    def forward(model: nn.Module, b: Any) -> tuple[Any, None]:
        logits, labels = logits_and_labels(model, b)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), None

    expected = fed(net, "exact", lambda: forward(net, batch)[0])
    found = fed(net, "exact", batch, model=net, forward=forward, loss_fn=lambda outputs, _: outputs)
    assert distance(found, expected) < 1e-14


def test_what_a_batch_needs_is_said() -> None:
    net, batch = small_net(), batches(1)[0]
    for options, kwargs, error, message in (
        ({}, {}, TypeError, "give PerturbedOPT its model=, or forward="),
        ({"model": net}, {}, TypeError, "loss_fn: missing; curvature='hutchinson' is of the loss"),
        ({"model": net}, {"forward": lambda m, b: 1, "loss_fn": F.mse_loss}, TypeError, "forward: returned a int"),
        ({"model": net}, {"forward": 3, "loss_fn": F.mse_loss}, TypeError, "forward: 3 given; give a function"),
    ):
        opt = PerturbedOPT(sgd(net.parameters()), curvature="hutchinson", **options)
        with pytest.raises(error, match=message):
            opt.update_curvature(batch, **kwargs)
        assert not opt._set.states
    opt = PerturbedOPT(sgd(net.parameters()), curvature="hutchinson", model=net)
    with pytest.raises(ValueError, match="batches are pairs"):
        opt.update_curvature({"x": batch[0]}, loss_fn=F.cross_entropy)
    with pytest.raises(TypeError, match="forward: given with a closure"):
        opt.update_curvature(lambda: loss_of(net, batch), forward=logits_and_labels)
    with pytest.warns(DeprecationWarning, match="closure= is now source="):
        assert opt.update_curvature(closure=lambda: loss_of(net, batch))  # type: ignore[call-arg]


# ---- warm-up ----


BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "lion": lambda params: Lion(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_a_warm_up_at_rate_0_feeds_the_curvature_and_moves_no_weight(base: str, start: int) -> None:
    net = small_net()
    opt = PerturbedOPT(BASES[base](net.parameters()), start=start)
    (group,) = opt.param_groups
    rate, group["lr"] = group["lr"], 0.0
    before, known = weights(net), []
    squares: list[list[Tensor]] = []
    for batch in batches(3):
        run(net, opt, [batch])
        known.append(curvatures(opt))
        squares.append([p.grad.square() for p in net.parameters()])
    assert same_bits(weights(net), before)
    assert opt._set.steps == 0
    assert not same_bits(known[0], known[1])
    for i, p in enumerate(net.parameters()):
        mean = sum(0.999 ** (2 - k) * 0.001 * own[i] for k, own in enumerate(squares)) / (1 - 0.999**3)
        torch.testing.assert_close(opt.curvature_of(p).curvature, mean, rtol=1e-4, atol=1e-9)
    if start:  # the gradients were those at w
        clean = small_net()
        backward(clean, batches(3)[2])
        assert distance([p.grad.abs() for p in clean.parameters()], [s.sqrt() for s in squares[2]]) < 1e-6
    group["lr"] = rate
    assert opt.active == (start == 0)
    run(net, opt, batches(1))
    assert opt._set.steps == 1
    assert distance(weights(net), before) > 0.0


@pytest.mark.parametrize("kind", ["hutchinson", "gnb", "function"])
def test_estimates_are_due_at_each_step_of_a_warm_up(kind: str) -> None:
    net, asked = small_net(), []

    def function(params: list[Tensor]) -> list[Tensor]:
        asked.append(len(params))
        return [p.detach() ** 2 for p in params]

    opt = PerturbedOPT(sgd(net.parameters()), curvature=function if kind == "function" else kind, curvature_interval=10)
    opt.param_groups[0]["lr"] = 0.0
    for batch in batches(3):
        if kind != "function":
            assert opt.update_curvature(lambda batch=batch: net(batch[0]) if kind == "gnb" else loss_of(net, batch))
        run(net, opt, [batch])
    assert opt._set.estimates == 3
    opt.param_groups[0]["lr"] = 0.1
    for batch in batches(12):
        if kind != "function":
            opt.update_curvature(lambda batch=batch: net(batch[0]) if kind == "gnb" else loss_of(net, batch))
        run(net, opt, [batch])
    assert opt._set.estimates == 5  # steps 0 and 10


def test_a_warm_up_resumes_to_the_bit() -> None:
    results = []
    for interrupted in (False, True):
        net = small_net()
        opt = PerturbedOPT(momentum_sgd(net), generator=torch.Generator().manual_seed(3))
        for i, batch in enumerate(batches(6)):
            opt.param_groups[0]["lr"] = 0.0 if i < 3 else 0.1
            run(net, opt, [batch])
            if interrupted and i == 1:
                state = opt.state_dict()
                opt = PerturbedOPT(momentum_sgd(net), generator=torch.Generator().manual_seed(9))
                opt.load_state_dict(state)
        results.append(weights(net))
    assert same_bits(*results)


def test_some_rates_of_0_are_no_warm_up() -> None:
    net = small_net()
    params = list(net.parameters())
    opt = PerturbedOPT(sgd([{"params": params[:2], "lr": 0.0}, {"params": params[2:]}]))
    run(net, opt, batches(2))
    assert opt._set.steps == 2
