"""How many channels each group keeps: budgets, patterns of names, predicted latency."""
