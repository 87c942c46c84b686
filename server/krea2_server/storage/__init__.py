"""Where images go that clients get as URLs."""
