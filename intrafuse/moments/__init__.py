"""Moments (means and covariances) of activations: from weights, or from calibration data."""

from intrafuse.moments import rules

__all__ = ["rules"]
