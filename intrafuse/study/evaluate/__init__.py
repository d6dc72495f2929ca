"""Measure accuracy, divergence, cost and sensitivity of networks."""

from __future__ import annotations

from intrafuse.study.evaluate.accuracy import accuracy

__all__ = ["accuracy"]
