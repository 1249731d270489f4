"""Sharpness-aware minimization and its relatives: one file for each."""

from .gsam import GSAM
from .sam import SAM

__all__ = ["GSAM", "SAM"]
