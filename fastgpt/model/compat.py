"""What the versions of transformers that fastgpt runs with name differently."""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# The cache of keys and values, as an argument and in outputs: "cache" from 5.24 on, "past_key_values" before.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def take_cache(given: Any, options: dict[str, Any]) -> Any:
    """The cache that a block or its attention was called with: given by position, or taken out of options by name.

    Before 5.24 options may hold another thing called "cache", the pages of continuous batching, which stays there.
    """
    given = options.pop("past_key_values", given)
    return options.pop(CACHE, given)
