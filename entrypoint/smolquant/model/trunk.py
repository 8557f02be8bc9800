"""The parts of a built model that read and write text: the language model in it, and its list of layers."""

from typing import Any

from torch import nn

from smolquant.errors import CheckpointError

_OTHER_SENSES = ("vision_config", "audio_config")


def language_model(model: Any, *, sees: bool) -> Any:
    """The part that reads and writes text; all of a model that does nothing else.

    Args:
        sees: whether the model answers about pictures.

    Raises:
        CheckpointError: it also sees or hears, and its text part is none of its own.
    """
    senses = sees or any(getattr(model.config, name, None) is not None for name in _OTHER_SENSES)
    if not senses:
        return model
    decoder, table = model.get_decoder(), model.get_input_embeddings()
    if (
        decoder in (model, model.base_model)
        or model.get_output_embeddings() is None
        or table not in set(decoder.modules())
    ):
        raise CheckpointError(
            f"{type(model).__name__} answers about more than text, and transformers does not tell its "
            "language model from the rest, which has to stay as it is.",
            hint="Choose a model whose class has a language model of its own, as most have.",
        )
    return decoder


def trunk_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers one after another, and the list of them.

    Raises:
        NotImplementedError: there is no list of layers.
    """
    lists = [
        (parent, child)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList)
    ]
    if not lists:
        raise NotImplementedError(f"{type(model).__name__} has no list of layers")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
