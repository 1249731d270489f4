"""Sharpness-aware minimization and its relatives: one file for each."""

from .sam import SAM

__all__ = ["SAM"]
