"""Optimizers that wrap an optimizer: the weights move for a gradient and come back for the step."""

from .perturbed_opt import PerturbedOPT
from .sam import SAM

__all__ = ["SAM", "PerturbedOPT"]
