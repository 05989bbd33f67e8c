"""One folder for each operation. Importing its `op` or `kernels` imports triton."""

from . import attention, decode_step, gelu_mlp, layer_norm, linear_cross_entropy, persistent_decode, sampling

__all__ = [
    "attention",
    "decode_step",
    "gelu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "persistent_decode",
    "sampling",
]
