"""Arguments by their old names: the same result, and a warning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flatmin
from flatmin import curvature, label_noise, ops
from flatmin._deprecated import renamed_arguments, renamed_value
from models import batches, closure_of, small_net, weights

Call = Callable[..., Any]


def _diag(**options: Any) -> Any:
    return curvature.hutchinson_diag(small_net(), F.cross_entropy, batches(1), samples=1, **options).value[0].tolist()


def _trace(**options: Any) -> Any:
    return curvature.hutchinson_trace(small_net(), F.cross_entropy, batches(1), samples=1, **options).value


def _lipschitz(**options: Any) -> Any:
    return curvature.lipschitz(small_net(), F.cross_entropy, batches(1), **({"curvature_samples": 1} | options))


def _sharpness(**options: Any) -> Any:
    return curvature.expected_sharpness(small_net(), F.cross_entropy, batches(1), scale=0.1, **options)


def _pacgen(**options: Any) -> Any:
    return flatmin.pacgen(small_net(), F.cross_entropy, batches(1), noise_samples=0, **options).psi


def _noise(**options: Any) -> Any:
    w = [torch.zeros(9)]
    ops.scaled_noise_(w, ops.backup_like(w), ops.random_key(1), eps=1.0, **options)
    return w[0].tolist()


def _probe(**options: Any) -> Any:
    w = [torch.zeros(9)]
    ops.probe_(w, ops.random_key(1), **options)
    return w[0].tolist()


def _samples(**options: Any) -> Any:
    return ops.draw_samples(3, 2, ops.random_key(1), **options).tolist()


def _regression(**options: Any) -> Any:
    return repr(flatmin.RegressionNoise(1.0, **options))


def _gradient_noise(**options: Any) -> Any:
    noise = flatmin.LabelNoise(3, 0.2, "uniform", generator=torch.Generator().manual_seed(0))
    return label_noise.gradient_noise(small_net(), F.cross_entropy, batches(1), noise, **options).variance


def _training(**options: Any) -> Any:
    """Weights after steps of PerturbedOPT. An old name in both spellings of an argument, plain and with its prefix."""
    net, generator = small_net(), torch.Generator().manual_seed(2)
    opt = flatmin.PerturbedOPT(net.parameters(), torch.optim.SGD, lr=0.1, generator=generator, **options)
    for batch in batches(3):
        opt.step(closure_of(net, opt, batch))
    return torch.cat([w.flatten() for w in weights(net)]).tolist()


def _squares(params: list[Tensor]) -> list[Tensor]:
    return [p.detach() ** 2 for p in params]


def _lipschitz_probes(**options: Any) -> Any:
    return curvature.lipschitz(small_net(), F.cross_entropy, batches(1), **options)


OLD: dict[str, tuple[Call, str, str, Any]] = {
    "hutchinson_diag": (_diag, "law", "distribution", "normal"),
    "hutchinson_trace": (_trace, "law", "distribution", "normal"),
    "lipschitz, law": (_lipschitz, "law", "distribution", "uniform"),
    "lipschitz, diag": (_lipschitz, "diag", "curvature", "squared_gradient"),
    "lipschitz, probes": (_lipschitz_probes, "probes", "curvature_samples", 2),
    "expected_sharpness": (_sharpness, "law", "distribution", "uniform"),
    "scaled_noise_": (_noise, "law", "distribution", "normal"),
    "probe_": (_probe, "law", "distribution", "normal"),
    "draw_samples": (_samples, "law", "distribution", "rademacher"),
    "RegressionNoise": (_regression, "law", "distribution", "normal"),
    "gradient_noise": (_gradient_noise, "draws", "samples", 2),
    "PerturbedOPT, dist": (_training, "dist", "distribution", "normal"),
    "PerturbedOPT, popt_dist": (_training, "popt_dist", "popt_distribution", "normal"),
    "PerturbedOPT, hessian": (_training, "hessian", "curvature", _squares),
    "PerturbedOPT, draws": (_training, "draws", "samples", 2),
    "pacgen": (_pacgen, "samples", "curvature_samples", 2),
}


@pytest.mark.parametrize(("call", "old", "new", "value"), OLD.values(), ids=OLD)
def test_an_old_name_is_the_new_one_with_a_warning(call: Call, old: str, new: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(**{new: value})
    with pytest.warns(DeprecationWarning, match=f"{old}= is now {new}=") as caught:
        assert call(**{old: value}) == expected
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match=f"{old}: the old name of {new}, and both are given"):
        call(**{old: value, new: value})


def test_signatures_show_the_new_names_only() -> None:
    assert "distribution" in inspect.signature(curvature.hutchinson_diag).parameters
    assert "law" not in inspect.signature(curvature.hutchinson_diag).parameters


def test_old_values() -> None:
    def configure(mode: str) -> Any:
        return renamed_value("mode", mode, {"global": "max"})

    with pytest.warns(DeprecationWarning, match="mode='global' is now 'max'") as caught:
        assert configure("global") == "max"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configure("element") == "element"
        assert renamed_value("curvature", [Tensor()], {"grad2": "squared_gradient"})[0].numel() == 0


@pytest.mark.parametrize(
    ("name", "old", "new"), [("curvature", "grad2", "squared_gradient"), ("lipschitz", "global", "max")]
)
def test_old_values_of_perturbed_opt(name: str, old: str, new: str) -> None:
    expected = _training(**{name: new})
    with pytest.warns(DeprecationWarning, match=f"{name}='{old}' is now '{new}'") as caught:
        assert _training(**{name: old}) == expected
    assert caught[0].filename == __file__


def test_the_interval_by_its_old_name() -> None:
    net = small_net()
    with pytest.warns(DeprecationWarning, match="hessian_interval= is now curvature_interval="):
        opt = flatmin.PerturbedOPT(
            torch.optim.SGD(net.parameters(), lr=0.1),
            curvature="gnb",
            hessian_interval=3,  # type: ignore[call-arg]
        )
    assert [opt._interval, opt._set.settings.curvature] == [3, "gnb"]


def test_constructors_take_old_names_too() -> None:
    class Wrapper:
        @renamed_arguments(dist="distribution")
        def __init__(self, *, distribution: str = "uniform") -> None:
            self.distribution = distribution

    with pytest.warns(DeprecationWarning, match="dist= is now distribution="):
        assert Wrapper(dist="normal").distribution == "normal"  # type: ignore[call-arg]


def test_a_checkpoint_from_before_the_renaming_loads() -> None:
    """Written out: none of its keys was renamed, and the run goes on from it."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    group = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    group |= {"foreach": None, "differentiable": False, "fused": None, "params": [0]}
    group |= {"popt_scale": 1.0, "popt_gamma": 0.25, "popt_eps": 1e-5}
    noise = {"seed": 5, "draws": 3, "estimates": 0, "estimated": -1, "steps": 4, "epoch": 2, "rho": torch.tensor(2.0)}
    noise["state"] = {0: {"updates": 4, "curvature": torch.tensor([0.5, 0.25])}}
    opt = flatmin.PerturbedOPT(torch.optim.SGD([w], lr=0.5), beta1=0.5)
    opt.load_state_dict({"base": {"state": {}, "param_groups": [group]}, "noise": noise})
    found = opt.curvature_of(w)
    assert [found.updates, opt.epoch, opt.param_groups[0]["popt_gamma"]] == [4, 2, 0.25]
    assert found.curvature.tolist() == pytest.approx([0.5 / 0.9375, 0.25 / 0.9375])
    assert opt.state_dict()["noise"].keys() == noise.keys()
    opt.ascend()
    assert tuple(opt.draw_of(w) or ()) == (5, 3, 0, 0)
    opt.restore()
