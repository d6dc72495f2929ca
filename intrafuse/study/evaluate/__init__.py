"""Measure what a network is worth."""

from __future__ import annotations

from intrafuse.study.evaluate.accuracy import accuracy

__all__ = ["accuracy"]
