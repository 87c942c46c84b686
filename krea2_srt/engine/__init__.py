"""Requests and their life, in pure Python: no torch, no SGLang."""
