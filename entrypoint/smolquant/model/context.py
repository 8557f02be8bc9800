"""The number of tokens that a model can see at once."""

from typing import Any

_UNLIMITED = 1 << 30


def longest_context(config: Any) -> int:
    """The number of tokens that a model with this transformers config can see at once.

    Returns:
        More tokens than any text has, where the config states no limit.
    """
    return getattr(config, "max_position_embeddings", None) or _UNLIMITED
