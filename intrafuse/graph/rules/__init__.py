"""One rule for each operator says how axes flow through it (DESIGN: the channel graph).

A new rule is one function with `register("operator")` in the file of its kind; a new file is
imported here.
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
