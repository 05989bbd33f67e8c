"""Generation over a static cache: the prompt through the model's own blocks, then one small forward per token.

`routing` says which calls of `generate()` come here.
"""

from .cache import KVCache, prefill
from .device_loop import DeviceGeneration
from .host_loop import Generation, Request
from .lookup import DeviceLookupGeneration, LookupGeneration
from .step import decode_one_token, decode_tokens
from .weights import view_weights, watched
from .workspace import obstacle, release, tier

__all__ = [
    "DeviceGeneration",
    "DeviceLookupGeneration",
    "Generation",
    "KVCache",
    "LookupGeneration",
    "Request",
    "decode_one_token",
    "decode_tokens",
    "obstacle",
    "prefill",
    "release",
    "tier",
    "view_weights",
    "watched",
]
