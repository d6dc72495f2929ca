"""One rule for each operator says what becomes of means and covariances.

A new rule is one function with `register("operator")` in the file of its kind; a new file is
imported here.
"""

from intrafuse.moments.rules import attention, combine, layers, norms, pointwise, shape

__all__ = ["attention", "combine", "layers", "norms", "pointwise", "shape"]
