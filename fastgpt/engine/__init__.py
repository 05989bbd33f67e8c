"""Generation over a static cache: the prompt through the model's own blocks, then one small forward per token.

`routing` says which calls of `generate()` come here.
"""

from .cache import KVCache, prefill
from .device import DeviceGeneration, obstacle, tier
from .generation import Generation, Request
from .speculation import LookupGeneration
from .step import decode_one_token, decode_tokens
from .weights import view_weights

__all__ = [
    "DeviceGeneration",
    "Generation",
    "KVCache",
    "LookupGeneration",
    "Request",
    "decode_one_token",
    "decode_tokens",
    "obstacle",
    "prefill",
    "tier",
    "view_weights",
]
