"""How much of a variant is embedding: what the size of a small model is mostly made of."""

from collections.abc import Mapping

from smolquant.record import TensorRecord

_REASONS = ("embedding", "output head")
"""How the plan's reason for such a tensor begins, kept or not; see :mod:`smolquant.model.architecture`."""


def embedding_bytes(tensors: Mapping[str, TensorRecord]) -> int:
    """Bytes in the variant of embeddings and output head; tied ones count once."""
    return sum(
        tensor.size_bytes for tensor in tensors.values() if tensor.reason.startswith(_REASONS)
    )
