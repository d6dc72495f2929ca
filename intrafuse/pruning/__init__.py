"""Plan, prune, repair and verify."""
