"""Training under noise that is sized by each weight's own curvature."""

from .perturbed_opt import NoiseStats, PerturbedOPT

__all__ = ["NoiseStats", "PerturbedOPT"]
