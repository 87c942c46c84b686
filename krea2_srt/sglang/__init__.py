"""Adapters between SGLang and the runner: no model maths, no policy."""
