"""The routes, what clients may send, and what they are sent."""
