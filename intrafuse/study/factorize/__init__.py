"""Factorised training: networks trained on parts of the data in parallel become one."""

from __future__ import annotations

from intrafuse.study.factorize.recipe import Recipe, read_recipe
from intrafuse.study.factorize.run import Factorized, factorize

__all__ = ["Factorized", "Recipe", "factorize", "read_recipe"]
