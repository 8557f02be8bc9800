"""How many tokens a model can see at once."""

from typing import Any

_UNLIMITED = 1 << 30


def longest_context(config: Any) -> int:
    """The number of tokens that a model with this transformers config can see at once.

    Of a model that also sees pictures it is that of the part which reads text.

    Returns:
        More tokens than any text has, where the config states no limit.
    """
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if get_text_config else config
    return getattr(config, "max_position_embeddings", None) or _UNLIMITED
