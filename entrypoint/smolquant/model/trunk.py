"""The parts of a built model that read and write text: the language model in it, and its list of layers."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from smolquant.errors import CheckpointError

_OTHER_SENSES = ("vision_config", "audio_config")


def language_model(model: Any, *, sees: bool) -> tuple[Any, set[nn.Module]]:
    """The part that reads and writes text, which is all of a model that does nothing else.

    Args:
        sees: whether the model answers about pictures.

    Returns:
        The part, and the modules in it that are for something else after all: those of its modules that
        do not compute when the model is given text alone.

    Raises:
        CheckpointError: it also sees or hears, and nothing tells its text part from the rest.
    """
    # Some text models stand in transformers' table of those that see; they have no configs but their own.
    senses = (sees and model.config.sub_configs) or any(
        getattr(model.config, name, None) is not None for name in _OTHER_SENSES
    )
    if not senses:
        return model, set()
    part = _part_of_its_own(model)
    if part is not None:
        return part, set()
    idle = _idle_with_text(model)
    if not any(module._parameters for module in idle):
        raise CheckpointError(
            f"{type(model).__name__} answers about more than text, and transformers does not tell its "
            "language model from the rest, which has to stay as it is.",
            hint="Choose a model whose class has a language model of its own, as most have.",
        )
    return model.base_model, idle


def _part_of_its_own(model: Any) -> Any:
    """The model's decoder, or else the smallest model in it that reads text; None where there is none."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return None
    whole = (model, model.base_model)
    models = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    smallest_first = sorted(models, key=lambda one: sum(1 for _ in one.modules()))
    for part in (model.get_decoder(), *smallest_first):
        modules = set(part.modules())
        has_layers = any(isinstance(module, nn.ModuleList) for module in modules)
        if part not in whole and table in modules and has_layers:
            return part
    return None


def _idle_with_text(model: Any) -> set[nn.Module]:
    """The modules that do not compute when a skeleton is given text alone; none where it fails."""
    computing: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: computing.add(module))
        for module in model.modules()
    ]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=True)
    except Exception:  # a model's own code raises anything
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    # A list of modules never computes itself; it is idle with all that it holds.
    return {module for module in model.modules() if computing.isdisjoint(module.modules())}


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
