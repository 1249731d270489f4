"""flatmin.sharpness.expected_sharpness with noise by filter, and in proportion to the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flatmin.sharpness import expected_sharpness
from sharpness_problems import Quadratic, mean_output, nothing, relu_data, relu_net


def test_noise_by_filter_and_by_tensor() -> None:
    """E of a quadratic is ``sum(a_i sigma_i^2) / 2`` for noise of variance sigma_i^2; Rademacher noise has no other."""
    a, w = [1.0, 4.0, 2.0, 0.5], [0.3, -0.4, 1.2, 0.5]
    net = Quadratic(a, w)
    net.a, net.w = net.a.view(2, 2), torch.nn.Parameter(net.w.detach().view(2, 2))
    options = {"scale": 3.0, "distribution": "rademacher", "samples": 500}
    filters = expected_sharpness(net, mean_output, nothing(), sizes="filter", **options)  # type: ignore[arg-type]
    tensors = expected_sharpness(net, mean_output, nothing(), sizes="tensor", **options)  # type: ignore[arg-type]
    by_filter = 4.5 * (5.0 * 0.25 + 2.5 * 1.69)
    assert abs(filters.value - by_filter) < 4.0 * filters.stderr
    assert abs(tensors.value - 4.5 * 7.5 * 1.94) < 4.0 * tensors.stderr
    assert filters.stderr < 0.05 * by_filter


@pytest.mark.parametrize("options", [{"gamma": 1.0, "eps": 0.0}, {"sizes": "filter"}])
def test_noise_in_units_of_the_weights_does_not_see_a_rescaled_relu_net(options: dict[str, object]) -> None:
    values = [
        expected_sharpness(relu_net(alpha), F.cross_entropy, relu_data(), scale=0.2, samples=3, **options).value  # type: ignore[arg-type]
        for alpha in (1.0, 10.0)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert abs(values[0]) > 1e-6


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^sizes"):
        expected_sharpness(relu_net(), F.cross_entropy, relu_data(), scale=0.1, sizes="layer")
