"""LayerNorm, and the residual sum before it, forward and backward."""
