"""Fusing several networks: matching graphs, alignment, stacking and restoring statistics."""
