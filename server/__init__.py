"""The images server."""
