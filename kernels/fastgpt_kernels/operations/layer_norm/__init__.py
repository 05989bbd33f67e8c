"""LayerNorm, alone or after a residual sum, forward and backward."""
