"""Measure what a network is worth."""

from __future__ import annotations

from intrafuse.evaluate.accuracy import accuracy

__all__ = ["accuracy"]
