"""Names that differ between the supported versions of transformers."""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# The cache of keys and values, as an argument and in outputs: "cache" from 5.24 on, "past_key_values" before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(given: Any, options: dict[str, Any]) -> Any:
    """The cache passed to a block or its attention by position, or by name, in which case it is taken out of options.

    Before 5.24, options may also hold a "cache" of another kind, the pages of continuous batching, which stays there.
    """
    given = options.pop("past_key_values", given)
    return options.pop(CACHE, given)


def update_options(options: dict[str, Any]) -> dict[str, Any]:
    """What transformers' attention passes to `Cache.update` besides keys, values and layer: its own from 5.24 on."""
    return {"kwargs": options} if CACHE == "cache" else {}
