"""Causal attention with padding and dropout, forward and backward."""
