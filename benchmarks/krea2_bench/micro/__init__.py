"""Small benchmarks of what every request pays, as ratios to work that any machine knows."""
