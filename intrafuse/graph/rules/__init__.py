"""Operator rules: one rule for each operator describes how axes flow through it.

To add a rule, write one function with `register("operator")` in the file of its kind. Import a new
file here.
"""

from intrafuse.graph.rules import (
    computed,
    index,
    layers,
    make,
    normed,
    patches,
    pointwise,
    products,
    recurrent,
    reduce,
    shape,
    spectral,
    statistics,
    sums,
)
from intrafuse.graph.rules.registry import (
    RULES,
    START,
    Literal,
    LockError,
    Scope,
    arguments,
    entering,
    line_of,
    location,
    modules_of,
    operator_name,
    register,
)

__all__ = [
    "RULES",
    "START",
    "Literal",
    "LockError",
    "Scope",
    "arguments",
    "computed",
    "entering",
    "index",
    "layers",
    "line_of",
    "location",
    "make",
    "modules_of",
    "normed",
    "operator_name",
    "patches",
    "pointwise",
    "products",
    "recurrent",
    "reduce",
    "register",
    "shape",
    "spectral",
    "statistics",
    "sums",
]
