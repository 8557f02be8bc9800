"""Whether a checkpoint's tensors and the model that its config asks for belong together."""

from collections import Counter
from collections.abc import Mapping

from smolquant.checkpoint.tensors import DTYPE_NAMES, Layout, SourceTensor
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture, Parameter
from smolquant.model.unplaced import Unplaced
from smolquant.names import shown


def unplaced_tensors(
    layout: Layout, architecture: Architecture, parameters: Mapping[str, Parameter | None]
) -> dict[str, Unplaced]:
    """The fate of every tensor that the model has no place for.

    Raises:
        CheckpointError: nothing is known of one, so that leaving it out may make another model.
    """
    nowhere = [layout.tensors[name] for name, parameter in parameters.items() if parameter is None]
    fates = {tensor.name: architecture.unplaced(tensor) for tensor in nowhere}
    unknown = [name for name, fate in fates.items() if fate is None]
    # A model of which nothing fits is told as one that lacks everything.
    if unknown and len(nowhere) < len(parameters):
        raise CheckpointError(
            f"{architecture.class_name} has no place for {len(unknown)} tensors of the checkpoint: "
            f"{shown(unknown)}. Without them a variant would be another model.",
            hint="Make sure that config.json names the class of these weights, or remove the tensors if "
            "the model does not need them.",
        )
    return {name: fate for name, fate in fates.items() if fate is not None}


def refuse_mismatch(
    layout: Layout,
    architecture: Architecture,
    parameters: Mapping[str, Parameter | None],
) -> None:
    """Make sure that every weight of the model is there once, has its shape, and holds numbers of its kind.

    Raises:
        CheckpointError: naming the first that is not so.
    """
    for name, parameter in parameters.items():
        shape = layout.tensors[name].shape
        if parameter:
            _require_values(layout.tensors[name], parameter)
        if parameter and parameter.shape != shape:
            raise CheckpointError(
                f"{name!r} has the shape {list(shape)}, but config.json asks for "
                f"{list(parameter.shape)}.",
                hint="Make sure that config.json belongs to these weights.",
            )
    names = [parameter.name for parameter in parameters.values() if parameter]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        both = [
            name for name, parameter in parameters.items() if parameter and parameter.name == twice
        ]
        raise CheckpointError(
            f"{' and '.join(map(repr, both))} are both the model's {twice!r}.",
            hint="Remove the one that a broken conversion left behind.",
        )
    missing = architecture.missing(set(names))
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of the model's weights, {missing[0]!r} among them; "
            "transformers would fill them with random numbers.",
            hint="Save the whole model (merge an adapter into its base first).",
        )


def _require_values(tensor: SourceTensor, parameter: Parameter) -> None:
    """Refuse a weight without values, or of integers, which no unquantized model has."""
    if parameter.is_buffer:
        return
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{tensor.name!r} is stored as {DTYPE_NAMES[tensor.dtype]}, integers where the model has "
            "floating-point weights.",
            hint="Start from the unquantized checkpoint.",
        )
    if 0 in tensor.shape:
        raise CheckpointError(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, and so no values.",
            hint="Save the model again with all of its weights, and config.json with it.",
        )
