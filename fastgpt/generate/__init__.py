"""Generation over a static cache: the model's own blocks run the prompt, then a decode step runs each token.

`routing` decides which calls of `generate()` come here.
"""

from .decoding import KVCache, decode_one_token, decode_tokens, prefill, view_weights
from .device_loop import DeviceGeneration
from .host_loop import Generation, Request
from .kept import release
from .lookup import DeviceLookupGeneration, LookupGeneration
from .workspace import obstacle, tier

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
]
