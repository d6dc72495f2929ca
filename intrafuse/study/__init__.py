"""Measure, compare, train and report; nothing of the pipeline imports it."""
