"""Comparisons of servers: same requests, interleaved, with confidence intervals."""
