"""Tensors of a checkpoint that the model has no place for: which are dropped, and which travel along.

Left out without a word, such a tensor may be what makes the model: a score head, an encoder. So only what
is known is dropped, and only what stock transformers passes over is carried along; the rest is refused.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from smolquant.checkpoint.tensors import SourceTensor


@dataclass(frozen=True)
class Unplaced:
    """The fate of a tensor that the model has no place for."""

    carried: bool
    """Whether the variants store it, as it is and under its own name; else it is dropped."""
    reason: str


_PREDICTS_AHEAD = re.compile(r"(^|\.)(mtp\w*|nextn\w*)\.")

_BUFFERS = (
    (
        re.compile(r"(^|\.)(inv_freq|cos_cached|sin_cached)$"),
        "a rotary buffer that older versions saved; the model computes it",
    ),
    (
        re.compile(r"(^|\.)position_ids$"),
        "a buffer of positions that older versions saved; the model computes it",
    ),
    (
        re.compile(r"(^|\.)(attn|attention)\.masked_bias$"),
        "an attention mask that older versions saved; the model computes it",
    ),
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""GPT-2's, GPT-J's and GPT-NeoX's triangle of ones; a bias of an attention layer has one axis."""


def fate_of(
    tensor: SourceTensor,
    name: str,
    *,
    layers: str | None,
    n_layers: int,
    ignored: Collection[str],
) -> Unplaced | None:
    """What becomes of a tensor that the model has no place for; None where it must not be passed over.

    Args:
        name: its name as transformers' loader sees it, after renaming.
        layers: the name of the list of the model's layers; None where it has none.
        n_layers: how many there are.
        ignored: regular expressions of names that the model's class ignores when it loads them.
    """
    if _PREDICTS_AHEAD.search(tensor.name):
        return Unplaced(
            True, "a layer that predicts several tokens ahead, which transformers does not load"
        )
    number = re.match(rf"{re.escape(layers)}\.(\d+)\.", name) if layers is not None else None
    if number and int(number[1]) >= n_layers:
        return Unplaced(
            True,
            f"a layer beyond the {n_layers} that config.json asks for, which transformers does not "
            "load",
        )
    for pattern, reason in _BUFFERS:
        if pattern.search(tensor.name):
            return Unplaced(False, reason)
    if _MASK.search(tensor.name) and len(tensor.shape) == 4 and tensor.shape[2] == tensor.shape[3]:
        return Unplaced(False, "an attention mask that older versions saved; the model computes it")
    if any(re.search(pattern, name) for pattern in ignored):
        return Unplaced(False, "ignored by the model's own class when it is loaded")
    return None
