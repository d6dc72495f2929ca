"""Choose how many channels each group keeps: budgets, name patterns, predicted latency."""
