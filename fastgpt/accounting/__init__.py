"""Exact accounting of GPT-2 at any size: parameters, storage, FLOPs and the speed limits that follow from them."""

from .costs import (
    H200_BANDWIDTH,
    H200_MATRIX_RATE,
    adamw_bytes,
    decode_bytes,
    decode_ceiling,
    forward_flops,
    kv_cache_bytes,
    peak_rate,
    prefill_ceiling,
    training_ceiling,
    training_flops,
    training_state_bytes,
    weight_bytes,
)
from .report import report
from .saved import PRECISIONS, activation_bytes, layer_saved_bytes, saved_bytes
from .shapes import PRESETS, ParameterCount, Shape, count_parameters, shape_of

__all__ = [
    "H200_BANDWIDTH",
    "H200_MATRIX_RATE",
    "PRECISIONS",
    "PRESETS",
    "ParameterCount",
    "Shape",
    "activation_bytes",
    "adamw_bytes",
    "count_parameters",
    "decode_bytes",
    "decode_ceiling",
    "forward_flops",
    "kv_cache_bytes",
    "layer_saved_bytes",
    "peak_rate",
    "prefill_ceiling",
    "report",
    "saved_bytes",
    "shape_of",
    "training_ceiling",
    "training_flops",
    "training_state_bytes",
    "weight_bytes",
]
