"""The Ray Serve application on this machine: ``python -m benchmarks.ray_serve``."""
