"""Measure, compare, train and report. The pipeline's rooms never import this room."""
