"""Processes and fakes that tests, benchmarks and drills share. Nothing that serves imports it."""
