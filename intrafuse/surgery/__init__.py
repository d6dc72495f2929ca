"""Change a network: merge maps, weights and their statistics, batch norm, and the module."""
