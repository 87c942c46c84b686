"""Checkpoint files in every dialect that people have, as named tensors."""
