"""Shared helpers: errors, files, devices, and calls into a model's own code."""
