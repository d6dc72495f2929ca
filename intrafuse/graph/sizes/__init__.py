"""Which numbers in a model's code follow the sizes of its channels."""
