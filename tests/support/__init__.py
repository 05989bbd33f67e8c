"""The support matrix: what runs on fused operations, in each class and on each backend, compared with transformers."""
