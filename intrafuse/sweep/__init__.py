"""Run a network operator by operator, and follow what changes as its groups are merged."""
