"""The Ray Serve application on this machine: ``python -m krea2_bench.ray_serve``."""
