"""How much of a variant is embedding: what the size of a small model is mostly made of."""

from collections.abc import Mapping

from smolquant.record import TensorRecord

_REASONS = ("embedding", "output head")
"""Why the plan keeps such a tensor; see :mod:`smolquant.architecture`."""


def embedding_bytes(tensors: Mapping[str, TensorRecord]) -> int:
    """Bytes in the variant of embeddings and output head that were kept; tied ones count once."""
    return sum(
        tensor.size_bytes
        for tensor in tensors.values()
        if not tensor.quantized and tensor.reason in _REASONS
    )
