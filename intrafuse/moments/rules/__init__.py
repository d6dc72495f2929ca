"""One rule for each operator maps means and covariances of its inputs to those of its result.

A new rule is one function with `register("operator")` in the file of its kind; a new file is
imported here.
"""

from intrafuse.moments.rules import attention, combine, layers, norms, pointwise, shape

__all__ = ["attention", "combine", "layers", "norms", "pointwise", "shape"]
