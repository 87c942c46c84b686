"""Benchmarks of krea2-srt; each is runnable as ``python -m benchmarks.NAME``."""
