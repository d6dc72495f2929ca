"""Factorized training: train networks on parts of the data in parallel, and make one of them."""

from __future__ import annotations

from intrafuse.study.factorize.recipe import Recipe, make_recipe, read_recipe
from intrafuse.study.factorize.run import Factorized, factorize

__all__ = ["Factorized", "Recipe", "factorize", "make_recipe", "read_recipe"]
