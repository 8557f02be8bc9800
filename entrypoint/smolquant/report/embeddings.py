"""The share of the embeddings in a variant, which make up most of a small model."""

from collections.abc import Mapping

from smolquant.record import TensorRecord

_KINDS = ("embedding", "output head")


def embedding_bytes(tensors: Mapping[str, TensorRecord]) -> int:
    """Bytes in the variant of embeddings and output head; tied ones count once.

    Records of older versions do not tell what a tensor is; there it is 0, as nothing is guessed.
    """
    return sum(tensor.size_bytes for tensor in tensors.values() if tensor.kind in _KINDS)
