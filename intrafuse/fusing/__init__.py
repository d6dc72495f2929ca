"""Fuse several networks: match graphs, align channels, stack networks, restore statistics."""
