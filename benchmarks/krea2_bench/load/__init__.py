"""The load generator: what is asked, when, and what came of it."""
