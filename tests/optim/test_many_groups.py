"""Many parameter groups: those with equal options are one list to the operators, with the bits of one group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import GSAM, SAM, PerturbedOPT, ops
from flatmin.ops import _library
from flatmin.optim import Lion
from flatmin.optim._buckets import PerturbedSet
from flatmin.optim.perturbed_opt._noise_set import NoiseSet
from models import same_bits

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}
STEPS = 4


def parameters(dtypes: Sequence[torch.dtype] = (torch.float32,), count: int = 12) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = [(5,), (3, 4), (2, 3, 2, 2), (17,)]
    return [nn.Parameter(torch.randn(shapes[i % 4], generator=g).to(dtypes[i % len(dtypes)])) for i in range(count)]


def train(opt: SAM, params: Sequence[nn.Parameter], change: Callable[[int], None] = lambda step: None) -> None:
    """Steps with gradients that depend on the weights, as those of a model do."""
    for step in range(STEPS):
        change(step)
        opt.zero_grad()
        for run in range(2):
            loss_of(params).backward()
            if run == 0:
                opt.ascend()
                opt.zero_grad()
        opt.step()


def loss_of(params: Sequence[nn.Parameter]) -> Tensor:
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    return torch.stack([((p.to(wide) - i) ** 2).sum() * 0.01 * (i + 1) for i, p in enumerate(params)]).sum()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each operator is called."""
    counted: Counter[str] = Counter()

    def counting(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted[name] += 1
            return operator(*args)

        return call

    for name, operator in _library.OPERATORS.items():
        monkeypatch.setitem(_library.OPERATORS, name, counting(name, operator))
    return counted


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_groups_with_equal_options_have_the_bits_and_the_calls_of_one(
    base: str, adaptive: bool, calls: Counter[str]
) -> None:
    results, counts = [], []
    for grouped in (False, True):
        params = parameters(count=159 if base == "sgd" else 12)
        opt = SAM(BASES[base]([{"params": [p]} for p in params] if grouped else params), rho=0.1, adaptive=adaptive)
        calls.clear()
        train(opt, params)
        results.append(params)
        counts.append(dict(calls))
    assert same_bits(*results)
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {STEPS}


OWN_RATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False),
    "lion": lambda groups: Lion(groups, lr=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("base", OWN_RATES)
def test_rates_and_radii_of_their_own_travel_in_one_list(base: str, calls: Counter[str]) -> None:
    """159 groups of one tensor that differ in learning rate, weight decay and radius, against the textbook: the norm of
    all gradients, each weight moved by its radius, and torch's own step from the old weights."""
    results = []
    for textbook in (False, True):
        params = parameters((torch.float64,), count=159)
        groups = [
            {"params": [p], "lr": 0.001 * (1 + i), "weight_decay": 0.01 * (i % 3), "sam_rho": 0.001 * (1 + i % 5)}
            for i, p in enumerate(params)
        ]
        if textbook:
            bare = OWN_RATES[base]([{k: v for k, v in group.items() if k != "sam_rho"} for group in groups])
            train_by_hand(bare, params, [float(group["sam_rho"]) for group in groups])
        else:
            calls.clear()
            train(SAM(OWN_RATES[base](groups), rho=0.1), params)
        results.append(params)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    step = {"rmsprop": "restore_", "adamw": "restore_adam_"}.get(base, f"restore_{base}_")
    assert calls == dict.fromkeys(("sam_norm_ascend_", step), STEPS)


def train_by_hand(bare: torch.optim.Optimizer, params: Sequence[nn.Parameter], radii: Sequence[float]) -> None:
    for _ in range(STEPS):
        old = [p.detach().clone() for p in params]
        for second in (False, True):
            bare.zero_grad()
            loss_of(params).backward()
            grads = [p.grad for p in params if p.grad is not None]
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            with torch.no_grad():
                for p, g, w, rho in zip(params, grads, old, radii, strict=True):
                    p.copy_(w if second else w + rho / norm * g)
        bare.step()


def test_weights_and_biases_are_one_list(calls: Counter[str]) -> None:
    """Two groups that differ in weight decay: what fine-tuning recipes do."""
    params = parameters()
    groups = [{"params": [p], "weight_decay": 0.1 * (i % 2)} for i, p in enumerate(params)]
    opt = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.1)
    train(opt, params)
    assert calls == dict.fromkeys(("sam_norm_ascend_", "restore_sgd_"), STEPS)
    bare = parameters()
    calls.clear()
    steps_of_bare = SAM(torch.optim.SGD([{"params": [p], "lr": 0.1 + i} for i, p in enumerate(bare)]), rho=0.0)
    train(steps_of_bare, bare)
    assert calls == {"restore_sgd_": STEPS}


def test_a_tensor_as_rate_keeps_its_group_apart(calls: Counter[str]) -> None:
    """Only its device knows its value: torch's own step takes it."""
    params = parameters()
    groups = [{"params": [p], "lr": torch.tensor(0.1) if i == 3 else 0.1} for i, p in enumerate(params)]
    train(SAM(torch.optim.SGD(groups, lr=0.1), rho=0.1), params)
    assert calls["norm"] == calls["sam_ascend_"] == 2 * STEPS
    twins = parameters()
    train(SAM(torch.optim.SGD(twins, lr=0.1), rho=0.1), twins)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("key", ["sam_rho", "sam_adaptive", "sam_eta"])
def test_options_of_the_ascent_count_for_each_group(key: str) -> None:
    """One norm spans all of them, and each moves by its own options: the textbook in float64."""
    values: dict[str, tuple[Any, Any]] = {"sam_rho": (0.1, 0.3), "sam_adaptive": (False, True), "sam_eta": (0.1, 0.5)}
    params = parameters((torch.float64,))
    groups = [{"params": [p], key: values[key][i % 2]} for i, p in enumerate(params)]
    opt = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.1, adaptive=key == "sam_eta")
    for p in params:
        p.grad = torch.sin(p.detach())
    before = [p.detach().clone() for p in params]
    opt.ascend()

    def scaling(p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.abs() + group["sam_eta"] if group["sam_adaptive"] and p.dim() > 1 else torch.ones_like(p)

    scales = [scaling(p, group) for p, group in zip(before, opt.param_groups, strict=True)]
    grads = [torch.sin(p) for p in before]
    norm = torch.stack([(t * g).square().sum() for t, g in zip(scales, grads, strict=True)]).sum().sqrt()
    for p, old, t, g, group in zip(params, before, scales, grads, opt.param_groups, strict=True):
        torch.testing.assert_close(p.detach(), old + group["sam_rho"] * t * t * g / norm, rtol=1e-12, atol=1e-14)
    opt.restore()
    assert same_bits(params, before)
    assert len(opt._set.buckets) == (1 if key == "sam_rho" else 2)


def test_one_tensor_as_radius_of_all_groups_keeps_them_together() -> None:
    rho = torch.tensor(0.1)
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in parameters()], lr=0.1), rho=rho)
    assert opt._set.partition(opt.param_groups, opt._keys(), opt._kinds()) == [tuple(range(12))]


@pytest.mark.parametrize("base", BASES)
def test_groups_part_and_meet_again_as_their_options_change(base: str) -> None:
    """A scheduler that moves some groups: as if each way of parting had always been so; between the ascent and the
    step too."""

    def changed_by(opt: SAM) -> Callable[[int], None]:
        def change(step: int) -> None:
            for index, group in enumerate(opt.param_groups):
                group["lr"] = 0.01 * (1 + (index % 2) * (step % 3))

        return change

    results = []
    for wrap in (SAM, OneByOne):
        params = parameters()
        opt = wrap(BASES[base]([{"params": [p]} for p in params]), rho=0.1)
        train(opt, params, changed_by(opt))
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class OneByOne(SAM):
    """A method with a direction of its own, which is a function of one group."""

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        assert len(params) == 1
        return grads


def ascended(params: Sequence[nn.Parameter]) -> tuple[SAM, list[Tensor]]:
    """A group for each parameter, away from the weights, which are returned, and with gradients of 1."""
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1), rho=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    opt.ascend()
    return opt, before


def test_an_option_that_changes_between_ascent_and_step_counts() -> None:
    params = parameters()
    opt, before = ascended(params)
    for index, group in enumerate(opt.param_groups):
        group["lr"] = float(index)
    opt.step()
    for index, (p, old) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p.detach(), old - float(index))


@pytest.mark.parametrize("which", [0, -1])
def test_a_group_that_goes_between_ascent_and_step_is_only_restored(which: int) -> None:
    params = parameters()
    opt, before = ascended(params)
    gone = opt.param_groups.pop(which)["params"][0]
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old if p is gone else old - 0.1)


def test_groups_of_several_types_share_no_list() -> None:
    """Their step would not fit one operator: here both take it."""
    params = parameters((torch.float32, torch.float64))
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1), rho=0.1)
    train(opt, params)
    assert {bucket.dtype for bucket in opt._set.buckets} == {torch.float32, torch.float64}
    assert len(opt._set.buckets) == 2


def test_stochastic_rounding_keeps_its_stream_for_each_group() -> None:
    params = parameters((torch.bfloat16,))
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1), rho=0.1, rounding="stochastic")
    train(opt, params)
    assert [bucket.groups for bucket in opt._set.buckets] == [(i,) for i in range(len(params))]


def test_groups_come_and_go() -> None:
    """Without gradients, frozen, excluded, added: the others step on."""
    params = parameters(count=8)
    opt = SAM(torch.optim.SGD([{"params": [p]} for p in params[:7]], lr=0.1, momentum=0.9), rho=0.1)
    twins = parameters(count=8)
    other = OneByOne(torch.optim.SGD([{"params": [p]} for p in twins[:7]], lr=0.1, momentum=0.9), rho=0.1)

    def changed_by(each: SAM, own: Sequence[nn.Parameter]) -> Callable[[int], None]:
        def change(step: int) -> None:
            own[3].requires_grad_(step != 1)
            if step == 2:
                each.param_groups[1]["sam_rho"] = 0.0
                each.add_param_group({"params": [own[7]]})

        return change

    train(opt, params, changed_by(opt, params))
    train(other, twins, changed_by(other, twins))
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)


def test_gsam_has_the_bits_of_one_group() -> None:
    results = []
    for grouped in (False, True):
        params = parameters()
        sgd = torch.optim.SGD([{"params": [p]} for p in params] if grouped else params, lr=0.1)
        train(GSAM(sgd, rho=0.1, alpha=0.3, rho_min=0.01, lr_max=0.2), params)
        results.append(params)
    assert same_bits(*results)


# ---- PerturbedOPT ----


def train_under_noise(opt: PerturbedOPT, params: Sequence[nn.Parameter], fused: bool = True) -> None:
    for step in range(STEPS):
        opt.zero_grad()
        with opt.perturb():
            loss = sum(((p.float() - i) ** 2).sum() * 0.01 * (i + 1) for i, p in enumerate(params))
            assert isinstance(loss, Tensor)
            loss.backward()
        if step == 2 and not fused:  # a parameter without gradient counts its own updates from here on
            params[1].grad = None
        opt.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"lipschitz": "element"}, {"sizing": "filter", "scale": 0.1}], ids=str)
def test_noise_does_not_depend_on_which_groups_share_a_list(
    options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    """Each group draws by itself, and has a size of its own; noise, restore, step and averages are one call each."""
    results, counts = [], []
    for merges in (True, False):
        if not merges:
            monkeypatch.setattr(NoiseSet, "partition", PerturbedSet.partition)
        params = parameters()
        own = {"popt_gamma": 0.2, "popt_eps": 0.1} if "sizing" not in options else {"popt_scale": 0.3}
        sgd = torch.optim.SGD(
            [{"params": [p], "weight_decay": 0.1 * (i % 2)} | (own if i % 3 else {}) for i, p in enumerate(params)],
            lr=0.1,
        )
        opt = PerturbedOPT(sgd, generator=torch.Generator().manual_seed(3), **options)
        calls.clear()
        train_under_noise(opt, params, fused)
        curvatures = [opt._set.states[p].curvature for p in params if p in opt._set.states]
        results.append([*params, *curvatures, *map(torch.Tensor.float, opt.noise_stats)])
        counts.append(dict(calls))
    assert same_bits(*results)
    ascents = STEPS - (not options.get("sizing"))
    assert counts[1]["scaled_noise_"] == 12 * ascents
    assert counts[0].get("restore_", 0) < 0.5 * counts[1]["restore_"]
    if fused:
        assert counts[0]["scaled_noise_"] == ascents
        assert counts[0]["restore_sgd_"] == (STEPS - (not options.get("sizing")))


def test_weights_come_back_when_a_draw_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lists that have not moved yet the backup holds nothing."""
    params = parameters((torch.float32, torch.float64))
    opt = PerturbedOPT(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1), sizing="isotropic", scale=0.1)
    before, drawn = [p.detach().clone() for p in params], []
    own = ops.scaled_noise_

    def fails(*args: Any, **options: Any) -> Tensor:
        if len(drawn) == 1:
            raise MemoryError
        drawn.append(args)
        return own(*args, **options)

    monkeypatch.setattr(ops, "scaled_noise_", fails)
    with pytest.raises(MemoryError):
        opt.ascend()
    assert same_bits(params, before)
    assert not opt._set.perturbed
    opt.restore()
    assert same_bits(params, before)


def test_a_frozen_parameter_keeps_its_own_count() -> None:
    """In the group of others that go on being updated."""
    a, b = (nn.Parameter(torch.tensor([x])) for x in (2.0, 3.0))
    opt = PerturbedOPT(torch.optim.SGD([a, b], lr=0.1), start=100)
    for step in range(3):
        a.requires_grad_(step != 1)
        opt.zero_grad()
        b.grad = torch.ones(1)
        if step != 1:
            a.grad = torch.ones(1)
        opt.step()
    assert [opt.curvature_of(p).updates for p in (a, b)] == [2, 3]
    assert float(opt.curvature_of(a).curvature) == pytest.approx(1.0)
