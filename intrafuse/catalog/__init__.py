"""Resolve MODEL strings to networks and SPEC strings to data sets."""
