"""Triton kernels for packed tokens, each beside its torch reference of the same signature."""
