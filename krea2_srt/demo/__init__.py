"""A complete, tiny Krea 2 checkpoint with random weights, for machines without a GPU."""
