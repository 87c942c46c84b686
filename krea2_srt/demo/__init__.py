"""A complete, tiny Krea 2 checkpoint, for machines without a GPU: trained, or random."""
