"""Running krea2-serve in production; see README.md beside this file."""
