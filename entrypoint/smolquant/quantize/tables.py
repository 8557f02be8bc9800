"""Two tables or one: embedding and output head that config.json ties, though the checkpoint stores both.

Stock transformers ties them only where they are equal, which it finds out when it has loaded them; with
quantized tables it cannot compare them at all. So the files are compared before anything is planned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from smolquant.checkpoint.reader import Checkpoint
from smolquant.checkpoint.source import Source
from smolquant.checkpoint.tensors import Layout, SourceTensor, row_blocks
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class StoredTables:
    """What is known of tensors that the config ties and the checkpoint stores twice."""

    equal: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> the one that it equals to the bit, so that storing that one is enough."""
    differ: bool = False
    """Whether any two differ, so that the model is in truth untied."""


ONE_TABLE = StoredTables()
"""Nothing is stored twice."""


def stored_tables(source: Source, layout: Layout, architecture: Architecture) -> StoredTables:
    """Compare every two tensors that config.json ties and the checkpoint stores by themselves.

    Their rows are read for it, from the Hub as ranges where the weights are not here; most checkpoints
    store only one, and none is read.

    Args:
        layout: the source's.

    Raises:
        CheckpointError: they differ, and the tie of others is needed.
    """
    names = {
        parameter.name: name
        for name in layout.tensors
        if (parameter := architecture.parameter(name))
    }
    pairs = _stored_twice(names, layout.aliases, architecture.ties_of_names)
    if not pairs:
        return StoredTables()
    streamed = source.can_stream and source.to_fetch().size > 0
    with source.checkpoint(streamed=streamed) as checkpoint:
        equal = {
            second: first
            for second, first in pairs.items()
            if _are_equal(checkpoint, layout.tensors[second], layout.tensors[first])
        }
    if len(equal) == len(pairs):
        return StoredTables(equal)
    needed = sorted(architecture.ties_of_names.keys() - names.keys())
    if needed:
        raise CheckpointError(
            f"{next(n for n in pairs if n not in equal)!r} differs from what config.json ties it to, and "
            f"{needed[0]!r} is not stored, so that the model is neither tied nor untied.",
            hint="Save the model again with `save_pretrained`.",
        )
    # In a config, all are tied or none: what is equal is stored twice, as the source does.
    return StoredTables(differ=True)


def _stored_twice(
    names: Mapping[str, str], aliases: Mapping[str, str], ties: Mapping[str, str]
) -> dict[str, str]:
    """Tensor -> the one that the config has it filled from, where both are stored and share no memory.

    Args:
        names: parameter -> tensor.
    """
    return {
        names[second]: names[first]
        for second, first in ties.items()
        if second in names and first in names and not {names[second], names[first]} & aliases.keys()
    }


def _are_equal(checkpoint: Checkpoint, one: SourceTensor, other: SourceTensor) -> bool:
    if one.shape != other.shape:
        return False
    # In the wider dtype, where a value of the narrower one is what it was.
    dtype = torch.promote_types(one.dtype, other.dtype)
    return all(
        torch.equal(
            checkpoint.read_rows(one, *rows, sequential=False).to(dtype),
            checkpoint.read_rows(other, *rows, sequential=False).to(dtype),
        )
        for rows in row_blocks(one, _BLOCK_BYTES)
    )
