"""Training under noise that is sized by each weight's own curvature."""

from .perturbed_opt import Draw, LayerStats, NoiseStats, PerturbedOPT, WeightNoise

__all__ = ["Draw", "LayerStats", "NoiseStats", "PerturbedOPT", "WeightNoise"]
