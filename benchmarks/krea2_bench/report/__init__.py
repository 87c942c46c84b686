"""Reports of load tests and comparisons: one page that stands alone, and pictures."""
