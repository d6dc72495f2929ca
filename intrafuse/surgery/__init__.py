"""Change a network: merge maps, its weights and their statistics, batch norm, the module itself."""
