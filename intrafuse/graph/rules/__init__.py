"""One rule for each operator says how axes flow through it (DESIGN: the channel graph).

A new rule is one function with `register("operator")` in the file of its kind; a new file is
imported here.
"""

from intrafuse.graph.rules import layers, pointwise, recurrent, reduce, shape
from intrafuse.graph.rules.registry import (
    RULES,
    LockError,
    Scope,
    arguments,
    entering,
    location,
    operator_name,
    register,
)

__all__ = [
    "RULES",
    "LockError",
    "Scope",
    "arguments",
    "entering",
    "layers",
    "location",
    "operator_name",
    "pointwise",
    "recurrent",
    "reduce",
    "register",
    "shape",
]
