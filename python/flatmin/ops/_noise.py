"""Random perturbations: noise by curvature, by size or alike everywhere, and probes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .._checks import check_finite, check_size
from .._deprecated import renamed_arguments
from .._devices import on_device
from ._codes import distribution_code
from ._curvature import lipschitz_of
from ._dispatch import run, scalar

__all__ = ["probe_", "random_key", "scaled_noise_"]


def random_key(seed: int, draw: int = 0, stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The key of a draw: uint64[2], the seed, and the draw in the lower with the stream in the upper 32 bits.

    Every random number of flatmin is a function of the key, the position of the tensor in its list and the position of
    the element in memory order (Philox4x32-10, Salmon et al. 2011): not of threads, instruction set or device. Draws
    and streams (one for each list, or for each rank, below 2^16) are independent. A key on a GPU can be advanced there
    (``key.view(torch.int32)[2].add_(1)``), so that a captured CUDA graph draws anew at each replay.
    """
    for name, value in (("seed", seed), ("draw", draw), ("stream", stream)):
        if not isinstance(value, int | Integral):
            raise TypeError(f"random_key: {name} {value!r} given; give an integer")
    if not (0 <= seed < 2**64 and 0 <= draw < 2**32 and 0 <= stream < 2**16):
        raise ValueError(
            f"random_key: seed {seed}, draw {draw}, stream {stream} given; they take 64, 32 and 16 bits and are not "
            "negative"
        )
    seed = int(seed)
    words = [seed - 2**64 if seed >= 2**63 else seed, int(stream) << 32 | int(draw)]
    # int64, viewed: Inductor makes no uint64
    return on_device(torch.tensor(words, dtype=torch.int64), torch.device(device or "cpu")).view(torch.uint64)


@renamed_arguments(law="distribution")
@torch.no_grad()
def scaled_noise_(
    params: Sequence[Tensor],
    backup: Tensor,
    key: Tensor,
    *,
    distribution: str = "uniform",
    scale: float | Tensor = 1.0,
    gamma: float = 0.0,
    eps: float = 0.0,
    curvatures: Sequence[Tensor] | None = None,
    sizes: Sequence[Tensor] | None = None,
    lipschitz: float | Tensor | Sequence[Tensor] = 0.0,
    curvature_scale: float | Tensor = 1.0,
) -> Tensor:
    """Save the parameters and add independent noise ``sigma_i xi_i`` of a size of its own to each element.

    The size is, with ``N_i = gamma |w_i| + eps``, one of

    * ``sigma_i = min(scale / sqrt(c_i), N_i)``, ``c_i = max(curvature_scale h_i + rho_i N_i, 0)``, where
      ``curvatures`` holds ``h`` and ``lipschitz`` is rho: more noise along flat directions (Wang et al. 2018, arXiv
      1809.07402);
    * ``scale sizes_i``, where ``sizes`` is given: per filter (LPF-SGD, RWP) or per tensor by expanded views of
      :func:`filter_norm`;
    * ``scale N_i`` otherwise: isotropic (``eps=1``) or multiplicative (``gamma=1``) noise.

    Args:
        params: changed in place. Their old bytes go to ``backup``; :func:`restore_` brings them back.
        backup: from :func:`backup_like`.
        key: from :func:`random_key`; or uint64[n, 3], for each parameter the two words of its key and its number in
            the list that the key is of. The noise is drawn in registers and never stored.
        distribution: of ``xi``: "uniform" on (-1, 1); "normal"; "truncated_normal", the normal law of ``sigma_i xi_i``
            cut at ``N_i`` (at ``sigma_i`` where the size is not from curvatures); "rademacher", +1 or -1.
        scale: float or 0-dim tensor; 0 moves nothing. With ``curvatures`` it is >= 0 and has the unit sqrt(loss). Else
            it has none, and its negative gives the other side of ``w``, as central differences need it. Or float64[n,
            3], a scale, gamma and eps of each parameter.
        gamma, eps: >= 0; the neighbourhood ``N_i``.
        curvatures: like ``params``, of their types or float32.
        sizes: like ``params``, of their types or float32; any strides, overlapping ones too.
        lipschitz: Hessian-Lipschitz constant rho >= 0: float, 0-dim tensor, or a list like ``params``.
        curvature_scale: multiplies ``curvatures``: the bias correction of an average.

    Returns:
        float64[3]: the sum of ``sigma_i``, how many are capped at ``N_i``, and how many are not finite because
        ``c_i`` is not: a curvature of NaN or infinity, of either sign. The weights of the last keep their bits: no NaN
        ever reaches a weight this way.
    """
    if curvatures is not None and sizes is not None:
        raise ValueError("curvatures and sizes: both given, but the size of the noise comes from one of them")
    code = distribution_code(distribution)
    check_size("gamma", gamma)
    check_size("eps", eps)
    if not isinstance(scale, Tensor):
        (check_finite if curvatures is None else check_size)("scale", scale)
    if not isinstance(curvature_scale, Tensor):
        check_finite("curvature_scale", curvature_scale)
    if not params:
        return torch.zeros(3, dtype=torch.float64)
    device = params[0].device
    for name, given in (("curvatures", curvatures), ("sizes", sizes)):
        if given is not None and not given:
            raise ValueError(f"{name}: an empty list given; give one tensor for each parameter, or None")
    per_element, constant = lipschitz_of(lipschitz, device)
    tally: Tensor = run(
        "scaled_noise_",
        params=params,
        curvatures=list(curvatures or ()),
        sizes=list(sizes or ()),
        lipschitz=per_element,
        backup=backup,
        key=key,
        scale=scalar(scale, device),
        lipschitz_constant=constant,
        curvature_scale=scalar(curvature_scale, device),
        law=code,
        gamma=gamma,
        eps=eps,
    )
    return tally


@renamed_arguments(law="distribution")
@torch.no_grad()
def probe_(tensors: Sequence[Tensor], key: Tensor, *, distribution: str = "rademacher") -> None:
    """Fill with independent draws of mean 0 and size 1: "rademacher", "normal" or "uniform", as in
    :func:`scaled_noise_`. The same key gives :func:`curvature_` and :func:`scaled_noise_` the same draws, so a probe
    need not be kept."""
    if distribution == "truncated_normal":
        raise ValueError(
            "distribution: 'truncated_normal' has no size without a cut; give 'rademacher', 'normal' or 'uniform'"
        )
    code = distribution_code(distribution)
    if tensors:
        run("probe_", tensors=tensors, key=key, law=code)
