"""One new token for each of a few rows, over a static cache: a step in seven kernels a layer."""
