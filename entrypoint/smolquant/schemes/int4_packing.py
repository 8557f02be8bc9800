"""Two int4 values a byte, as torchao's ``Int4Tensor`` stores them, and back."""

import torch


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Pack values in [-8, 7], the even column in the low nibble.

    Args:
        values: (n, K) int8, K even.

    Returns:
        (n, K / 2) int8, the layout of torchao's ``Int4Tensor.qdata``.
    """
    # Two bytes at a time, the even column in the lower: picking every other byte takes four times as long.
    pairs = values.contiguous().view(torch.int16)
    return ((pairs & 0xF) | ((pairs >> 4) & 0xF0)).to(torch.uint8).view(torch.int8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_int4`.

    Args:
        packed: (n, K / 2) int8, two values a byte, the even column in the low nibble.

    Returns:
        (n, K) int8 in [-8, 7].
    """
    low = (packed << 4) >> 4  # arithmetic shifts carry the sign of the low nibble
    high = packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)
