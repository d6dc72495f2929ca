"""Find the numbers in a model's code that follow the sizes of its channels."""
