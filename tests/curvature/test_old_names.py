"""Arguments by their old names: the same result, and a warning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import flatmin
from flatmin import curvature
from flatmin._deprecated import renamed_arguments, renamed_value
from models import batches, small_net

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


def _lipschitz_probes(**options: Any) -> Any:
    return curvature.lipschitz(small_net(), F.cross_entropy, batches(1), **options)


OLD: dict[str, tuple[Call, str, str, Any]] = {
    "hutchinson_diag": (_diag, "law", "distribution", "normal"),
    "hutchinson_trace": (_trace, "law", "distribution", "normal"),
    "lipschitz, law": (_lipschitz, "law", "distribution", "uniform"),
    "lipschitz, diag": (_lipschitz, "diag", "curvature", "squared_gradient"),
    "lipschitz, probes": (_lipschitz_probes, "probes", "curvature_samples", 2),
    "expected_sharpness": (_sharpness, "law", "distribution", "uniform"),
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


def test_constructors_take_old_names_too() -> None:
    class Wrapper:
        @renamed_arguments(dist="distribution")
        def __init__(self, *, distribution: str = "uniform") -> None:
            self.distribution = distribution

    with pytest.warns(DeprecationWarning, match="dist= is now distribution="):
        assert Wrapper(dist="normal").distribution == "normal"  # type: ignore[call-arg]
