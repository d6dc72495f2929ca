"""Moments (means and covariances) of activations: from weights, or from calibration data."""
