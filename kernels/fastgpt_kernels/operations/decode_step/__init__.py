"""One new token for each of a few rows, over a static cache: a step in five kernels per layer."""
