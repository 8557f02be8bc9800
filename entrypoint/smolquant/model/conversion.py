"""A checkpoint's tensors as the parameters that transformers makes of them when it loads a model.

Most parameters are one tensor. Some are made of several: a mixture's experts, which checkpoints store one
by one, become one stack; queries, keys and values one weight. Where the rows of the tensors, in some
order, are those of the parameter, they are read row by row as they are. Everything else transformers
computes, from whole tensors. Nothing here knows a family by name, nor what quantizing is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from smolquant.checkpoint.tensors import (
    ConvertedTensor,
    JoinedTensor,
    Layout,
    SourceTensor,
    pieces_of,
    prevalent_dtype,
)
from smolquant.errors import CheckpointError
from smolquant.names import shown
from smolquant.text import error_words

Rename = Callable[[str], tuple[str, str | None]]
"""From a checkpoint's name to the parameter's, and the source pattern of what converts it, if anything."""


def converted_layout(
    layout: Layout, model: Any, rename: Rename, converters: Sequence[Any]
) -> Layout:
    """``layout`` with a tensor for each parameter, named as in the model, where transformers converts.

    A converted parameter takes the place of the first tensor that it is made of.

    Args:
        model: the skeleton; what it has no parameter for is not converted.
        rename: transformers' ``rename_source_key`` for the model.
        converters: transformers' ``get_model_conversion_mapping`` of the model, without renamings.

    Raises:
        CheckpointError: tensors do not fit together.
    """
    groups = _groups(layout, rename, converters) if converters else {}
    known = model.state_dict().keys()
    made = {target: _made(target, group, model, known) for target, group in groups.items()}
    target_of = {
        piece.name: target
        for target, group in groups.items()
        if made[target]
        for piece in group.pieces
    }
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in layout.tensors.items():
        placed = made[target_of[name]] if name in target_of else {name: tensor}
        for parameter, one in placed.items():
            _refuse_two(parameter, tensors.setdefault(parameter, one), one)
    aliases = {
        name: first
        for name, first in layout.aliases.items()
        if name not in target_of and first not in target_of
    }
    return Layout(tensors, aliases, layout.wrapper)


def _refuse_two(parameter: str, first: SourceTensor, second: SourceTensor) -> None:
    """One parameter stored both in pieces and whole: transformers takes either, by the order of names."""
    if first is second:
        return
    pieces = {one.name for tensor in (first, second) for one in pieces_of(tensor)}
    raise CheckpointError(
        f"{parameter!r} is stored twice, whole and in pieces: {shown(sorted(pieces))}.",
        hint="Remove the ones that a conversion left behind.",
    )


@dataclass
class _Group:
    """The tensors that one converter takes for one parameter or, if it splits, for several."""

    converter: Any
    """transformers' ``WeightConverter``."""
    by_pattern: dict[str, list[SourceTensor]] = field(default_factory=dict)
    """Source pattern -> its tensors, in the order in which transformers hands them over."""

    @property
    def pieces(self) -> list[SourceTensor]:
        """All tensors, in that order."""
        return [piece for pieces in self.by_pattern.values() for piece in pieces]


def _groups(layout: Layout, rename: Rename, converters: Sequence[Any]) -> dict[str, _Group]:
    """Parameter, or the first of several -> what it is made of, where anything is converted."""
    from transformers.core_model_loading import dot_natural_key

    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(layout.tensors, key=dot_natural_key):
        target, pattern = rename(name)
        if pattern is not None:
            group = groups.setdefault(target, _Group(of_pattern[pattern]))
            group.by_pattern.setdefault(pattern, []).append(layout.tensors[name])
    return groups


def _made(target: str, group: _Group, model: Any, known: Set[str]) -> dict[str, SourceTensor]:
    """Parameter -> how it is read; nothing where the model has no such parameters."""
    joined = _joined(target, group)
    if joined is not None:
        return {target: joined} if target in known else {}
    pieces = tuple(group.pieces)
    convert = partial(_converted, target, group, model)
    shapes = [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in pieces]
    try:
        made = convert(shapes)
    except Exception as error:  # whatever transformers' operations raise
        if target not in known:
            return {}
        raise CheckpointError(
            f"transformers cannot make {target!r} of {len(pieces)} tensors of the checkpoint, "
            f"{pieces[0].name!r} among them: {error_words(error)}.",
            hint="Make sure that config.json belongs to these weights.",
        ) from error
    if not made.keys() <= known:
        return {}
    if len(shapes) == 1 and made.get(target) is shapes[0]:  # nothing to do for this shape
        return {pieces[0].name: pieces[0]}
    return {
        name: ConvertedTensor(
            name,
            prevalent_dtype(pieces),
            tuple(tensor.shape),
            pieces,
            partial(_only, name, convert),
        )
        for name, tensor in made.items()
    }


def _joined(target: str, group: _Group) -> JoinedTensor | None:
    """The parameter whose rows are those of its tensors; None where they are not."""
    patterns = [group.by_pattern.get(one, []) for one in group.converter.source_patterns]
    first = group.pieces[0]
    operations = group.converter.operations
    if any(len({one.shape for one in pieces}) > 1 for pieces in patterns):
        return None
    match [(type(one).__name__, getattr(one, "dim", None)) for one in operations]:
        case [("MergeModulelist", 0)] if len(patterns) == 1:
            pieces, shape = patterns[0], (len(patterns[0]), *first.shape)
        case [("MergeModulelist", 0), ("Concatenate", 1)] if len({len(p) for p in patterns}) == 1:
            pieces = [piece for expert in zip(*patterns, strict=True) for piece in expert]
            rows = sum(pieces_of_one[0].rows for pieces_of_one in patterns)
            shape = (len(patterns[0]), rows, *first.shape[1:])
        case [("Concatenate", 0)]:
            pieces = [piece for pieces in patterns for piece in pieces]
            shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        case _:
            return None
    alike = len({(piece.dtype, piece.shape[1:]) for piece in pieces}) == 1
    joined = JoinedTensor(target, first.dtype, shape, tuple(pieces))
    return joined if alike and sum(piece.rows for piece in pieces) == joined.rows else None


def _converted(
    target: str, group: _Group, model: Any, whole: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What transformers makes of a group's tensors, which are given in the order of its pieces."""
    converter = copy.deepcopy(group.converter)  # it holds tensors while it works
    given = iter(whole)
    for pattern, pieces in group.by_pattern.items():
        for piece in pieces:
            converter.add_tensor(target, piece.name, pattern, next(given))
    made: dict[str, torch.Tensor] = converter.convert(target, model=model, config=model.config)
    return {
        name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
    }


def _only(
    name: str,
    convert: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]],
    whole: Sequence[torch.Tensor],
) -> torch.Tensor:
    """One of the parameters that are made."""
    return convert(whole)[name].contiguous()
