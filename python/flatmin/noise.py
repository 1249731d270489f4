"""The name that :class:`flatmin.PerturbedOPT` had in version 0.1."""

from .optim.perturbed_opt import NoiseStats, PerturbedOPT

__all__ = ["NoiseStats", "PerturbedOPT"]
