"""Causal attention with a padding mask and dropout, forward and backward."""
