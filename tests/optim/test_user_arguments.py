"""Arguments as users give them: names that a wrapper and its base both have, dead keys, numbers of numpy."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flatmin import GSAM, SAM, PerturbedOPT
from models import backward, batches, closure_of, same_bits, sgd, small_net, weights

# ---- names that both have ----


def test_the_base_gets_what_its_signature_names() -> None:
    params = [nn.Parameter(torch.ones(2))]
    opt = SAM(params, torch.optim.AdamW, lr=1e-3, eps=1e-4)
    assert opt.base.defaults["eps"] == 1e-4
    assert opt._set.eps == 1e-12
    opt = SAM(params, torch.optim.AdamW, lr=1e-3, eps=1e-4, sam_eps=1e-3, sam_rho=0.7)
    assert (opt.base.defaults["eps"], opt._set.eps, opt.param_groups[0]["sam_rho"]) == (1e-4, 1e-3, 0.7)
    assert SAM(params, torch.optim.SGD, lr=0.1, eps=1e-3)._set.eps == 1e-3  # SGD has none
    noise = PerturbedOPT(params, torch.optim.AdamW, lr=1e-3, eps=1e-4, popt_eps=0.5)
    assert (noise.base.defaults["eps"], noise.param_groups[0]["popt_eps"]) == (1e-4, 0.5)


def test_an_equal_value_is_given_all_the_same() -> None:
    opt = SAM([nn.Parameter(torch.ones(2))], torch.optim.AdamW, lr=1e-3, eps=float("1e-12"))
    assert opt.base.defaults["eps"] == 1e-12


def test_whose_radius_is_meant_has_to_be_said() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="rho: both the wrapper and Adadelta have one; give sam_rho="):
        SAM(params, torch.optim.Adadelta, rho=0.5)
    opt = SAM(params, torch.optim.Adadelta, rho=0.5, sam_rho=0.01)
    assert (opt.base.defaults["rho"], opt.param_groups[0]["sam_rho"]) == (0.5, 0.01)
    assert SAM(params, torch.optim.Adadelta, sam_rho=0.02).param_groups[0]["sam_rho"] == 0.02
    with pytest.raises(TypeError, match="rho: given twice, as rho and as sam_rho"):
        SAM(params, torch.optim.SGD, lr=0.1, rho=0.5, sam_rho=0.5)


def test_a_dead_key_of_a_live_optimizer_is_refused() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.1)
    opt.param_groups[0]["rho"] = 0.5  # as a trainer's set_params does
    backward(net, batch)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['rho'\]: nobody would read it"):
        opt.ascend()


def test_a_relative_shares_in_the_same_way() -> None:
    """RMSprop has an alpha, which is not GSAM's."""
    params = [nn.Parameter(torch.ones(2))]
    opt = GSAM(params, torch.optim.RMSprop, alpha=0.9)
    assert (opt.base.defaults["alpha"], opt._alpha) == (0.9, 0.4)
    opt = GSAM(params, torch.optim.RMSprop, alpha=0.9, gsam_alpha=0.1, rho=0.7)
    assert (opt.base.defaults["alpha"], opt._alpha, opt.param_groups[0]["sam_rho"]) == (0.9, 0.1, 0.7)
    assert GSAM(params, torch.optim.SGD, lr=0.1, alpha=0.2)._alpha == 0.2


def test_a_function_as_base_shares_by_its_own_signature() -> None:
    params = [nn.Parameter(torch.ones(2))]
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    assert SAM(params, adamw, eps=1e-4).base.defaults["eps"] == 1e-4

    def build(params: Any, eps: float = 1e-8, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3, eps=10 * eps, **options)

    opt = PerturbedOPT(params, build, eps=1e-4, popt_eps=0.5, weight_decay=0.25)
    assert (opt.base.defaults["eps"], opt.param_groups[0]["popt_eps"]) == (1e-3, 0.5)
    assert opt.base.defaults["weight_decay"] == 0.25


# ---- scalars of numpy ----


NUMPY: list[tuple[type, dict[str, Any]]] = [
    (SAM, {"rho": np.float32(0.5), "eta": np.float64(0.25), "eps": np.float32(0.5), "adaptive": True}),
    (SAM, {"p": np.float32(2.0), "interval": np.int64(2), "start": np.int32(1)}),
    (GSAM, {"alpha": np.float32(0.5), "rho_min": np.float32(0.25), "lr_max": np.float64(0.5), "lr_min": np.int64(0)}),
    (PerturbedOPT, {"beta1": np.float32(0.5), "beta2": np.float64(0.25), "samples": np.int64(2)}),
    (PerturbedOPT, {"lipschitz": np.float32(2.0), "gamma": np.float32(0.5), "eps": np.float64(0.125)}),
    (PerturbedOPT, {"sizing": "isotropic", "scale": np.float32(0.5), "start": np.int64(1)}),
]


@pytest.mark.parametrize(("wrap", "options"), NUMPY)
def test_scalars_of_numpy_are_numbers(wrap: Any, options: dict[str, Any]) -> None:
    """The same weights, and a checkpoint that torch loads without pickle."""
    results = []
    for of_numpy in (True, False):
        given = {k: v if of_numpy or not isinstance(v, np.generic) else v.item() for k, v in options.items()}
        torch.manual_seed(0)
        net = small_net()
        opt = wrap(sgd(net.parameters()), **given)
        for batch in batches(4):
            opt.step(closure_of(net, opt, batch))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        opt.load_state_dict(torch.load(file, weights_only=True))
        opt.step(closure_of(net, opt, batches(1)[0]))
        results.append(weights(net))
    assert same_bits(*results)
