"""Factorised training: networks trained on parts of the data in parallel become one."""

from __future__ import annotations

from intrafuse.factorize.recipe import Recipe, read_recipe
from intrafuse.factorize.run import Factorized, factorize

__all__ = ["Factorized", "Recipe", "factorize", "read_recipe"]
