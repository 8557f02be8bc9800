"""What a source's files hold, refused by its cause where it is not a whole model with plain weights.

What is wrong with a checkpoint shows here, by names, dtypes and shapes, before a weight is read; a plan
would only see that they do not fit.
"""

from collections.abc import Callable, Mapping

from smolquant.checkpoint.source import Source
from smolquant.checkpoint.tensors import WRAPPERS, Layout
from smolquant.errors import CheckpointError
from smolquant.model.architecture import Architecture, Parameter
from smolquant.text import one_line

Notice = Callable[[str, str], None]


def sound_layout(source: Source, architecture: Architecture, notice: Notice) -> Layout:
    """What the weight files' headers say of a model that ``architecture`` is the skeleton of.

    Args:
        notice: is told the title and the text of what is odd, and left out.

    Raises:
        CheckpointError: the weights are packed by another quantizer, empty, named by a wrapper in part, or
            in other files than those that transformers reads.
    """
    try:
        layout = architecture.converted(source.layout())
    except CheckpointError as error:
        if not architecture.quantizer:
            raise
        raise _packed(architecture.quantizer, one_line(error.message).rstrip(".")) from error
    parameters = {name: architecture.parameter(name) for name in layout.tensors}
    if architecture.quantizer:
        _refuse_packed(architecture, layout, parameters)
        notice(
            f"A left-over of {architecture.quantizer} is left out",
            f"config.json has a quantization_config ({architecture.quantizer}), and all weights are plain. "
            "The variants do without it; remove it from the source too.",
        )
    _refuse_empty(layout, parameters)
    _refuse_wrapped(layout, parameters)
    _refuse_unread_shards(source, architecture, parameters)
    if layout.wrapper:
        notice(
            f"Every weight's name begins with {layout.wrapper}",
            "It is left out: torch.compile or data parallelism wrapped the model when it was saved. "
            "transformers does not load such names; save the model itself, without the wrapper.",
        )
    return layout


Parameters = Mapping[str, Parameter | None]


def _refuse_packed(architecture: Architecture, layout: Layout, parameters: Parameters) -> None:
    """Only plain weights of the model's own shapes are what no quantizer has touched."""
    for name, tensor in layout.tensors.items():
        parameter = parameters[name]
        if parameter is None:
            # Beside a linear layer's weight, or, as a stack of experts has no module, with its name.
            owners = (f"{name.rpartition('.')[0]}.weight", name.rpartition("_")[0])
            if not name.endswith(".bias") and any(map(architecture.parameter, owners)):
                raise _packed(architecture.quantizer, f"{name!r} goes with a packed weight")
        elif parameter.shape != tensor.shape:
            shapes = f"{list(tensor.shape)} where the model has {list(parameter.shape)}"
            raise _packed(architecture.quantizer, f"{name!r} has the shape {shapes}")
        elif parameter.kind != "other" and not tensor.dtype.is_floating_point:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise _packed(architecture.quantizer, f"{name!r} is stored as {dtype}")


_LOADED_PLAIN = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
"""Quantizer -> transformers' config for it that dequantizes the weights as they are loaded."""

_DEQUANTIZED = ("bitsandbytes", "higgs")
"""Quantizers whose loaded models transformers can dequantize."""


def _packed(quantizer: str, why: str) -> CheckpointError:
    hint = "Start from the unquantized checkpoint"
    if quantizer in _LOADED_PLAIN:
        config = f"{_LOADED_PLAIN[quantizer]}(dequantize=True)"
        call = f"AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config={config})"
        hint += f", or have transformers dequantize this one: `{call}`, and save that"
    elif quantizer in _DEQUANTIZED:
        hint += ", or load this one with transformers and save `model.dequantize()`"
    return CheckpointError(
        f"This checkpoint is quantized already, by {quantizer} (so config.json, and so the files): {why}.",
        hint=f"{hint}.",
    )


def _refuse_empty(layout: Layout, parameters: Parameters) -> None:
    empty = [
        name
        for name, tensor in layout.tensors.items()
        if (parameter := parameters[name]) and 0 in tensor.shape and 0 not in parameter.shape
    ]
    if empty:
        raise CheckpointError(
            f"{len(empty)} of {len(layout.tensors)} weights are empty, {empty[0]!r} among them: DeepSpeed "
            "ZeRO-3 divides the weights among processes, and one that saves by itself saves such ones.",
            hint="Put them together from the checkpoint's folder: `python zero_to_fp32.py . merged`; and "
            "train with `stage3_gather_16bit_weights_on_model_save: true`.",
        )


def _refuse_wrapped(layout: Layout, parameters: Parameters) -> None:
    """Names that begin with a wrapper's, when others do not, or that have one inside."""
    wrapped = [
        name
        for name, parameter in parameters.items()
        if parameter is None and any(wrapper in f".{name}" for wrapper in _INSIDE)
    ]
    if wrapped:
        raise CheckpointError(
            f"{len(wrapped)} of {len(layout.tensors)} weights have names that torch.compile or data "
            f"parallelism gave them, {wrapped[0]!r} among them, and transformers knows none of these.",
            hint="Save the model itself, without the wrapper: of a compiled module its `_orig_mod`, of "
            "DataParallel its `module`.",
        )


_INSIDE = [f".{wrapper}" for wrapper in WRAPPERS]


def _refuse_unread_shards(
    source: Source, architecture: Architecture, parameters: Parameters
) -> None:
    index = source.unread_index
    missing = architecture.missing({one.name for one in parameters.values() if one})
    if index is None or not missing:
        return
    single = source.weights[0]
    raise CheckpointError(
        f"{single} lies beside {index}, and transformers reads only {single} then, "
        f"which lacks {len(missing)} of the model's weights, {missing[0]!r} among them.",
        hint=f"Remove {single} if an earlier or another save left it there; the shards are read then.",
    )
