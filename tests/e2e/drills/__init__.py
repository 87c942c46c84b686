"""Drills: break a running deployment on purpose, and see that what the guide says comes true."""
