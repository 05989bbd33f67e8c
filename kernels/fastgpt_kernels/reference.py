"""Every operation in plain torch: the specification, the parity reference and the path for CPUs.

Right in every floating dtype up to float64, differentiable in every floating input, on any device.
"""

from .operations.attention.reference import causal_attention
from .operations.gelu_mlp.reference import gelu_mlp
from .operations.layer_norm.reference import add_layer_norm, layer_norm
from .operations.linear_cross_entropy.reference import linear_cross_entropy

__all__ = ["add_layer_norm", "causal_attention", "gelu_mlp", "layer_norm", "linear_cross_entropy"]
