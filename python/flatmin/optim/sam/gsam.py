"""Surrogate-gap guided sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import check_one_of, check_size, plain
from .._arguments import share_arguments
from ._inner_products import blend_, gram
from .sam import SAM

__all__ = ["GSAM"]


class GSAM(SAM):
    """SAM whose step also closes the surrogate gap: it descends the perturbed loss without climbing the loss itself.

    With ``g1`` the gradient at ``w`` and ``g2`` that at ``w + e`` the base steps with (Zhuang et al. 2022, arXiv
    2203.08065, Algorithm 1)::

        G = g2 - alpha (g1 - <g1, g2> / ||g2||^2 g2)     minimize="perturbed"
        G = g1 + alpha (g2 - <g1, g2> / ||g1||^2 g1)     minimize="loss"

    The first is the paper's: ``G - g2`` is orthogonal to ``g2``. The second, an option of its authors' code, keeps the
    descent of the loss and adds what of ``g2`` is orthogonal to it. The inner products span every parameter that has
    both gradients, over groups and devices.

    The radius follows the learning rate of each group, where ``rho_min`` is given::

        rho_t = rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min)

    Args:
        optimizer_or_params: the optimizer to wrap, or parameters as an optimizer takes them; then give ``base``.
        base: class of the optimizer to build around parameters.
        rho: the radius, or the largest one. Default 0.05.
        alpha: weight of the orthogonal part, >= 0. 0 is SAM ("perturbed") or the base ("loss"). Per group of
            parameters: no, since the inner products span all of them.
        minimize: "perturbed" or "loss".
        rho_min: the smallest radius, reached at ``lr_min``; None keeps ``rho`` as it is.
        lr_max: learning rate at which the radius is ``rho``. Required with ``rho_min``.
        lr_min: learning rate at which it is ``rho_min``. Equal to ``lr_max``, the radius is ``rho``.
        options: what :class:`SAM` takes, and arguments of ``base``.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
    """

    needs_first_gradient = True
    group_checks: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {**SAM.group_checks, "gsam_rho_min": check_size}

    def __init__(
        self,
        optimizer_or_params: Any,
        base: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        alpha: float = 0.4,
        minimize: str = "perturbed",
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"alpha": alpha, "minimize": minimize, "rho_min": rho_min}
        own |= {"lr_max": lr_max, "lr_min": lr_min}
        share_arguments(GSAM.__init__, "gsam_", own, base, options)
        _check_options(**own)
        own = {name: plain(value) for name, value in own.items()}
        super().__init__(optimizer_or_params, base, **options)
        self._alpha, self._minimize = own["alpha"], own["minimize"]
        self._rates = own["lr_min"], own["lr_max"]
        if own["rho_min"] is not None:
            self._define_keys({"gsam_rho_min": own["rho_min"]})

    def radius(self, group: dict[str, Any]) -> float | Tensor:
        largest: float | Tensor = group["sam_rho"]
        smallest = group.get("gsam_rho_min")
        low, high = self._rates
        if smallest is None or low == high:
            return largest
        rho: float | Tensor = smallest + (largest - smallest) * (group["lr"] - low) / (high - low)
        return rho

    def combine(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        products = gram(first, second, sync=self._set.sync)
        base = products[1, 1] if self._minimize == "perturbed" else products[0, 0]
        projection = torch.where(base > 0.0, products[0, 1] / base, 0.0)
        alpha = torch.full_like(projection, self._alpha)
        if self._minimize == "perturbed":
            coefficients = [1.0 + alpha * projection, -alpha]
        else:
            coefficients = [alpha, 1.0 - alpha * projection]
        blend_(second, torch.stack([*coefficients, torch.zeros_like(alpha)]), first)


def _check_options(*, alpha: Any, minimize: Any, rho_min: Any, lr_max: Any, lr_min: Any) -> None:
    check_size("alpha", alpha)
    check_one_of("minimize", minimize, ("perturbed", "loss"))
    if rho_min is None:
        return
    check_size("rho_min", rho_min)
    check_size("lr_min", lr_min)
    if lr_max is None:
        raise ValueError("lr_max: missing; rho_min needs the learning rate at which the radius is rho")
    check_size("lr_max", lr_max)
    if lr_max < lr_min:
        raise ValueError(f"lr_max: {lr_max} given, below lr_min = {lr_min}")
