"""Optimizers that wrap an optimizer: the weights move for a gradient and come back for the step. Lion is a base for
them that torch does not have."""

from .lion import Lion
from .perturbed_opt import PerturbedOPT
from .sam import GSAM, SAM

__all__ = ["GSAM", "SAM", "Lion", "PerturbedOPT"]
