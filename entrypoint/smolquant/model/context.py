"""What a model can be given: how many tokens at once, and which."""

from typing import Any

_UNLIMITED = 1 << 30


def longest_context(config: Any) -> int:
    """The number of tokens that a model with this transformers config can see at once.

    Of a model that also sees pictures it is that of the part which reads text.

    Returns:
        More tokens than any text has, where the config states no limit.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None) or _UNLIMITED


def known_tokens(model: Any) -> int:
    """The number of token ids, from 0 on, that a transformers model has a row for on both of its sides.

    That is in its embedding and in its output head, which a few models have of different lengths.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(table.weight.shape[0]) for table in tables if table is not None)
